"""A folder with a tiny Hugging Face Llama, its tokenizer and two texts, for the tests of language commands."""

from pathlib import Path

import torch

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = ["--batch", "2", "--length", "8", "--specialist-steps", "2", "--mix-steps", "2"]
"""Options of a job with specialists and joint training."""
JOINT = ["--batch", "2", "--length", "8", "--mix-steps", "2"]
"""Options of a job without specialists."""
APART = ["--batch", "2", "--length", "8", "--specialist-steps", "2"]
"""Options of a job without joint training."""


def write_llama_job(folder: Path) -> Path:
    """Write `llama`, `code.txt` and `law.txt`.

    Args:
        folder: Where they go.

    Returns:
        The folder.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(30)]
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=31, max_position_embeddings=64))
    model.save_pretrained(folder / "llama")
    for name, start in (("code", 0), ("law", 15)):
        (folder / f"{name}.txt").write_text(" ".join(words[start + (i * i) % 15] for i in range(300)))
    return folder


def text_options(job: Path) -> list[str]:
    """Give the two texts as options.

    Args:
        job: The folder of `write_llama_job`.

    Returns:
        The words.
    """
    return ["--texts", f"code={job / 'code.txt'}", f"law={job / 'law.txt'}"]
