"""Compare a checkpoint with its plan.

    python verify.py CHECKPOINT

Checks every matrix of planned.json, next to this script: its shape, its number of zeros, and the zeros of every group
where groups are planned. Exits with code 1 if one differs. Needs torch and safetensors.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def read(folder):
    """Yield the name and the tensor of every matrix."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if key.endswith(".weight"):
                    yield key.removesuffix(".weight"), file.get_tensor(key)


def compare(weight, planned, tolerance):
    """Return the difference of a matrix from the plan, and its number of zeros."""
    if list(weight.shape) != planned["shape"]:
        return f"has the shape {list(weight.shape)}, and {planned['shape']} is planned", 0
    zeros = int((weight == 0).sum())
    if abs(zeros - planned["zeros"]) > tolerance * weight.numel():
        return f"has {zeros} zeros, and {planned['zeros']} are planned", zeros
    if planned["group"]:
        kept, size = planned["group"]
        most = int((weight.reshape(-1, size) != 0).sum(1).max())
        if most > kept:
            return f"keeps {most} of {size} somewhere, and {kept} are planned", zeros
    return None, zeros


def main():
    """Print one line per matrix, with its difference from the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder with *.safetensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    plan = json.loads((Path(__file__).parent / "planned.json").read_text())
    left, rows = dict(plan["modules"]), {}
    for name, weight in read(arguments.checkpoint):
        if name in left:
            planned = left.pop(name)
            if planned["shape"] is None:
                rows[name] = {"planned": 1.0, "achieved": 0.0, "wrong": "is there, and should be gone"}
                continue
            weight = weight.T if planned["transposed"] else weight
            wrong, zeros = compare(weight.to(torch.float32), planned, plan["tolerance"])
            rows[name] = {
                "planned": planned["zeros"] / weight.numel(),
                "achieved": zeros / weight.numel(),
                "wrong": wrong,
            }
    for name, planned in left.items():
        rows[name] = {
            "planned": 1.0,
            "achieved": 1.0,
            "wrong": None if planned["shape"] is None else "is missing",
        }
    wrong = {name: row["wrong"] for name, row in rows.items() if row["wrong"]}
    if arguments.json:
        print(json.dumps({"modules": rows, "wrong": wrong}, indent=1))
    else:
        for name, row in rows.items():
            print(f"{name:50} zeros planned {row['planned']:.4f}  achieved {row['achieved']:.4f}  {row['wrong'] or ''}")
        print(f"{len(rows) - len(wrong)} of {len(rows)} matrices are as planned")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
