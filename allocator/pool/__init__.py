"""Evaluation on a Ray cluster. The only package that imports Ray.

``dispatch``    the evaluator: what is sent to workers, and what happens when they die
``actor_pool``  actors that pull calls; every call is answered once
``calls``       a call of an actor, and the mark of a lost worker
``durations``   how long calls take, and when they are late
``runs``        how a batch of requests is cut into runs
``worker``      the actor: one engine in one process
``cluster``     the connection to a cluster
``jobs``        jobs that are sent to a cluster
"""
