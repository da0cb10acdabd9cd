"""The drawn data set on disk, and the two small tokenizers learnt from its captions."""
import json
import math
import multiprocessing
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

import draw

TEXT_LENGTH = 64        # T5 tokens of every prompt, padded
CLIP_LENGTH = 77


def _one(job):
    seed, marks, shape = job
    rng = random.Random(seed)
    a = draw.sample_split(rng, test=False)
    face = draw.sample_face(rng, marks)
    return np.asarray(draw.draw(a, face, rng, shape)), [draw.CHOICES[k].index(v) for k, v in vars(a).items()]


def make(path, count, seed, marks, shape="1:1", workers=2):
    """Draw `count` training portraits into `path`.npy and their attributes into `path`.attr.npy."""
    path = Path(path)
    if path.with_suffix(".attr.npy").exists():
        return
    out = np.lib.format.open_memmap(f"{path}.npy", "w+", np.uint8, (count, *draw.SHAPES[shape][::-1], 3))
    attrs = np.zeros((count, len(draw.CHOICES)), np.int8)
    with multiprocessing.Pool(workers) as pool:
        jobs = [(f"{seed}-{i}", marks, shape) for i in range(count)]
        for i, (pixels, a) in enumerate(pool.imap(_one, jobs, 64)):
            out[i], attrs[i] = pixels, a
    out.flush()
    np.save(path.with_suffix(".attr.npy"), attrs)


def attributes_of(row):
    return draw.Attributes(*(v[i] for v, i in zip(draw.CHOICES.values(), row)))


# ------------------------------------------------------------------------------- tokenizers

def caption_corpus(count=30000, seed=5):
    rng = random.Random(seed)
    return [draw.caption(draw.sample_attributes(rng), rng)[0] for _ in range(count)]


# A few words no caption has: what people add to trigger words and negative prompts.
EXTRA = ("sks ohwx style photo painting sketch cartoon face girl boy lady old young cute funny "
         "robot cat dog blurry ugly low quality bad detailed high best standing looking at the "
         "camera close up outdoors eyes eye nose mouth scarf jacket dress brown dark light").split()


def make_tokenizers(folder):
    """CLIP's byte-level BPE and T5's Unigram, in the files that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Regex
    folder = Path(folder)
    texts = caption_corpus() + EXTRA * 3

    # CLIP: lower-case, byte level, "</w>" at the end of words, two special tokens at the end.
    one = folder / "tokenizer"
    one.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tok.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
            behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1200, min_frequency=2, show_progress=False, end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learnt = json.loads(tok.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learnt["merges"]]
    # CLIP's own order: 256 bytes, 256 bytes that end a word, one token per merge, two specials.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    (one / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    (one / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = dict(lstrip=False, normalized=True, rstrip=False, single_word=False)
    (one / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=CLIP_LENGTH, do_lower_case=True,
        add_prefix_space=False, errors="replace",
        bos_token=dict(special, content="<|startoftext|>", __type="AddedToken"),
        eos_token=dict(special, content="<|endoftext|>", __type="AddedToken"),
        unk_token="<|endoftext|>", pad_token="<|endoftext|>"), indent=2))
    (one / "special_tokens_map.json").write_text(json.dumps(dict(
        bos_token=dict(special, content="<|startoftext|>"),
        eos_token=dict(special, content="<|endoftext|>"),
        unk_token="<|endoftext|>", pad_token="<|endoftext|>"), indent=2))

    # T5: Unigram with "▁" for spaces. Every word of the captions is one piece, scored by the
    # logarithm of its frequency; single characters, far less likely, spell all other words.
    two = folder / "tokenizer_2"
    two.mkdir(parents=True, exist_ok=True)
    counts = Counter(w for t in texts for w in re.findall(r"▁\w+|\w+|[^\w▁]", "▁" + t.replace(" ", "▁")))
    total = sum(counts.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(w, math.log(n / total)) for w, n in sorted(counts.items()) if n > 1 and len(w) > 1]
    letters = ["▁"] + [chr(c) for c in range(33, 127)]
    vocab += [(c, math.log(max(counts[c], 0.001) / total)) for c in letters]
    tok = Tokenizer(models.Unigram(vocab, unk_id=2))
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tok.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tok.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tok.save(str(two / "tokenizer.json"))
    (two / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="T5TokenizerFast", model_max_length=TEXT_LENGTH, eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", extra_ids=0, additional_special_tokens=[],
        clean_up_tokenization_spaces=False), indent=2))
    (two / "special_tokens_map.json").write_text(json.dumps(dict(
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>"), indent=2))
