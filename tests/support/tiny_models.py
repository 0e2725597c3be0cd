"""Tiny models with random weights, built from configs: one of many architectures each."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(33, 127)]
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "pad_token_id": 0}  # fmt: skip
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | {"max_position_embeddings": 130},
    "xlm-roberta": BERT | {"max_position_embeddings": 130},
    "albert": BERT | {"embedding_size": 16},
    "electra": BERT | {"embedding_size": 16},
    "deberta": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "mpnet": BERT,
    "camembert": BERT | {"max_position_embeddings": 130},
    "convbert": BERT | {"embedding_size": 32},
    "modernbert": BERT,
    "mobilebert": BERT | {"embedding_size": 32, "intra_bottleneck_size": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma3_text": LLAMA,
    "gpt_neox": BERT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "esm": BERT | {"position_embedding_type": "rotary", "mask_token_id": 4},
    "ernie": BERT,
    "nomic_bert": BERT,
    "roformer": BERT,
    "phi": BERT,
    "funnel": {"d_model": 32, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64,
               "architectures": ["FunnelModel"]},
}  # fmt: skip
CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt_neox",
          "bloom", "phi")  # fmt: skip


def save_tokenizer(folder: Path, padding_side: str = "right", pad: bool = True) -> int:
    """A tokenizer over single characters, titles between [CLS] and [SEP]; its size.

    Byte pairs without a pair: transformers makes those of any vocabulary in a folder of Qwen2.
    """
    words = [*SPECIAL, *LETTERS, "Ġ"]  # the last is the space
    vocabulary = {word: number for number, word in enumerate(words)}
    plain = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
              "eos_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
    tokens |= {"pad_token": "[PAD]"} if pad else {}
    whole = PreTrainedTokenizerFast(tokenizer_object=plain, padding_side=padding_side, **tokens)
    whole.save_pretrained(folder)
    return len(words)


def save_model(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """A transformers model of random weights with its tokenizer; its folder.

    `changes`: options of its config. Decoders get a tokenizer that pads on the left.
    """
    left = architecture in CAUSAL or architecture == "xlnet"
    size = save_tokenizer(folder, "left" if left else "right")
    options = {"vocab_size": size} | ARCHITECTURES[architecture] | changes
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


CODE = """\
from transformers import BertConfig, BertModel


class OurConfig(BertConfig):
    model_type = "ours"


class OurModel(BertModel):
    config_class = OurConfig
"""


def add_code(folder: Path) -> Path:
    """Turn a BERT's folder into that of a model that brings its Python code."""
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "ours.OurConfig", "AutoModel": "ours.OurModel"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "ours", "auto_map": code})
    )
    (folder / "ours.py").write_text(CODE)
    return folder
