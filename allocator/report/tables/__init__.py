"""Tables for a terminal of 80 to 100 columns, and the rows that the page shares with them.

A function ``*_table`` returns a table, ``format_*`` returns text, ``list_*`` returns rows or headings.

``result``   a finished search: measurements and predicted latencies
``front``    a Pareto front
``compare``  a comparison of rules and plans
``plan``     a plan, and the targets that plans are handed to
``model``    a model before any search: matrices, search space, latencies
``status``   the status of a run
``formats``  numbers as text
``base``     the style that all tables share
"""
