"""Write the decisions of a carved model's pre-gate on real documents as a trace for the runtime's simulator.

    python benchmarks/studies/moe_runtime_documents.py carved/model --out docs/experiments/moe_runtime/documents.json

Test documents of the four domains of `moe_texts.py`: 12 of each, 256 tokens from their beginning. The file holds numbers of experts and no
text. It depends on the pre-gate, so the name of the model is printed. Takes some seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from moe_assets import default_cache
from moe_texts import DOMAINS, split_texts

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.recorded_decisions import DecisionSource, RecordedDecisions, write_decisions
from upcycle3d.perception.moe.serving.hugging_face_coder import HuggingFaceCoder
from upcycle3d.perception.moe.serving.served_models import open_served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that `upcycle3d moe readme` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=12, help="documents of each domain")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each document; shorter documents are passed over")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    served, coder = open_served(arguments.model), HuggingFaceCoder(arguments.model)
    served.experts.file.close()
    gate = served.pre_gate
    if gate is None:
        raise InvalidInput(f"{arguments.model} has one expert and no pre-gate, so there is nothing to record")
    sources: list[DecisionSource] = []
    for domain, parts in split_texts(default_cache()).items():
        found = 0
        for text in parts["test"]:
            ids = coder.encode(text)[: arguments.tokens]
            if found == arguments.documents or len(ids) < arguments.tokens:
                continue
            experts = gate.decide(torch.tensor([ids])).index
            assert experts is not None
            sources.append(DecisionSource(name=f"{domain} {found}", experts=tuple(experts[:, 0].tolist())))
            found += 1
        print(f"{domain}: {found} documents of {len(parts['test'])}")
    decisions = RecordedDecisions(experts=gate.config.experts, sources=tuple(sources))
    write_decisions(arguments.out, decisions)
    print(f"{served.description}\n{100 * decisions.repeated:.1f} % of the decisions repeat the one before; experts by domain:")
    for domain in DOMAINS:
        own = [e for source in sources if source.name.split()[0] == domain for e in source.experts]
        print(
            domain,
            *(
                f"{served.description.domains[e]} {100 * own.count(e) / max(1, len(own)):.0f} %"
                for e in range(gate.config.experts)
            ),
        )


if __name__ == "__main__":
    main()
