"""The process that `overload.py` overloads: `moe serve` as it is, with a small model whose tokens are letters, or with a small detector.

python -m faults.overload_server FOLDER PORT MOST_REQUESTS
"""

import sys
from pathlib import Path

import torch

from moe_served import LetterCoder
from upcycle3d.perception.moe.driving.carved_folder import is_carved_detector, open_carved_detector
from upcycle3d.tools.moe_serve import MoeServe, detector_config, serve, serve_detector, serving_config

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, port, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if is_carved_detector(folder):
        room = f"{open_carved_detector(folder).context_bytes}B"  # one of the two contexts
        options = MoeServe(folder=folder, budget=room, most_requests=most, port=port, grace=5.0)
        serve_detector(options, detector_config(options))
    else:
        options = MoeServe(folder=folder, budget="20KB", keys_values="1MB", tokens=128, most_requests=most, port=port, grace=5.0)
        serve(options, serving_config(options), LetterCoder)
