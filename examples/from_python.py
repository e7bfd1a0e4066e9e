"""A search from Python on the packaged model: its figures, its front, and a plan for another point of it.

Run it with ``python examples/from_python.py``.
"""

import allocator

if __name__ == "__main__":
    result = allocator.search(
        target=0.5,
        method="evolution",
        budget="20 evaluations",
        workers=0,
        name="from-python",
        settings=[
            "tokens.calibration=2048",
            "tokens.selection=512",
            "tokens.test=512",
            "search.evolution.tokens=[512,1024]",
        ],
    )
    print(f"uniform {result.figures['uniform']['kl']:.4f}, searched {result.figures['searched']['kl']:.4f} KL")

    run = allocator.open_run(result.folder)
    for member in run.front:
        print(f"{member['params']:,} parameters, KL {member['kl']:.4f}")
    print(f"{len(run.evaluations)} evaluations")

    run.plan(index=0).save(result.folder / "densest.json")
    counted = allocator.prune(result.folder / "densest.json", result.folder / "densest", execution="recompute")
    print(f"the densest member of the front has {counted:,} parameters")
