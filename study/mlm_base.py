"""Make the study's masked-LM base: all-MiniLM-L6-v2 with a new LM head, trained on film reviews.

    python study/mlm_base.py --model sentence-transformers/all-MiniLM-L6-v2 --out models/minilm-mlm

all-MiniLM-L6-v2 has no masked-LM head, so WikiText-2 cannot be scored on it. This adds one, tied to
the embeddings, and trains it with the encoder's layers by masked LM (BERT §3.1) on IMDB's 50,000
unlabelled reviews; the embeddings stay as they are. It has never seen Wikipedia, and its perplexity
there is far above a real BERT's: what the study compares is how far each method brings it down. The
study's own copy was made in this way from 5.8 million tokens and reached a perplexity of 46 on
reviews it had not seen; another run gives other weights, so figures differ a little.
"""

import argparse
import sys
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Data, learning_rate_scale  # noqa: E402
from harness.batches import collate, length_grouped_batches, predicted_tokens  # noqa: E402
from harness.rows import load_tokenizer, read_file, tokenize  # noqa: E402
from harness.splits import Split, flat  # noqa: E402


def blocks_of(texts, tokenizer, length):
    """Reviews as one stream of tokens in blocks [CLS] … [SEP]: a Split."""
    encoded = tokenize(texts, tokenizer, "reviews", add_special_tokens=False)
    stream, size = [token for row in encoded["input_ids"] for token in row], length - 2
    parts = [stream[i : i + size] for i in range(0, len(stream) - size, size)]
    rows = [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts]
    flags = [[False, *(True for _ in part), False] for part in parts]
    return Split(*flat(rows), None, torch.tensor([flag for row in flags for flag in row]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of all-MiniLM-L6-v2")
    add("--out", required=True, help="folder for the new checkpoint")
    add("--text", help="parquet file with a text column (default: IMDB's unlabelled reviews)")
    add("--epochs", type=int, default=1)
    add("--max_steps", type=int, default=10**9)
    add("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    tokenizer, _ = load_tokenizer(args.model)
    file = args.text or huggingface_hub.hf_hub_download(
        "stanfordnlp/imdb",
        "plain_text/unsupervised-00000-of-00001.parquet",
        repo_type="dataset",
    )
    examples, _ = read_file("--text", Path(file))
    split = blocks_of([example["text"] for example in examples], tokenizer, 128)
    ids = (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer))
    data = Data("mlm", False, None, *ids, split, split, split, 0, {})

    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32)
    model.base_model.embeddings.requires_grad_(False)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01, fused=True)
    per_epoch = len(length_grouped_batches(split.lengths, 32, 0))
    total = min(args.max_steps, args.epochs * per_epoch)
    bar = tqdm(range(1, total + 1), "training", disable=None)
    for step in bar:
        epoch, place = divmod(step - 1, per_epoch)
        if place == 0:
            targets = predicted_tokens(data, split, 0, epoch)
            batches = length_grouped_batches(split.lengths, 32, 0, epoch)
        batch = collate(data, split, batches[place], targets)
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask)[0]
        loss = F.cross_entropy(
            model.cls(hidden.flatten(0, 1)[batch.output_positions]), batch.target
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_scale(step, total, 0.06)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
