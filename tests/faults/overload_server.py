"""The process that `overload.py` overloads: `moe serve` as it is, with a small model whose tokens are letters.

python -m faults.overload_server FOLDER PORT MOST_REQUESTS
"""

import sys
from pathlib import Path

import torch

from moe_served import LetterCoder
from upcycle3d.tools.moe_serve import MoeServe, serve, serving_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, port, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    options = MoeServe(folder=folder, budget="20KB", keys_values="1MB", tokens=128, most_requests=most, port=port, grace=5.0)
    serve(options, serving_config(options), LetterCoder)
