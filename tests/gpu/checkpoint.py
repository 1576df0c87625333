"""Makes a GLM-5.2-shaped FP8 checkpoint with random weights, small enough for one GPU.

checkpoint.py TOKENIZER DIRECTORY

The architecture, the quantization and the widths that one of eight tensor-parallel GPUs has are GLM-5.2's; the depth
(four layers and one for multi-token prediction), the experts (16) and the vocabulary are not. So an engine takes the
kernels that it would take, and its answers mean nothing. About 270 MB in five files.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILES = 5
BLOCK = 128
END_TOKENS = [0, 5, 7]  # <|endoftext|>, <|user|>, <|observation|> of the tests' tokenizer
CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "qk_head_dim": 256,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_share_for_mtp_iteration": True,
    "moe_router_dtype": "float32",
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": END_TOKENS,
    "use_cache": True,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
GENERATION = {"eos_token_id": END_TOKENS, "pad_token_id": 0, "temperature": 1.0, "top_p": 0.95, "do_sample": True}


class Weights:
    """The tensors by their names in a checkpoint of GLM-5.2-FP8."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.random = torch.Generator().manual_seed(7)
        self.tensors: dict[str, torch.Tensor] = {}
        width, words = config["hidden_size"], config["vocab_size"]
        self.normal("model.embed_tokens.weight", words, width)
        self.normal("lm_head.weight", words, width)
        self.ones("model.norm.weight", width)
        for number in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
            self.layer(number)

    def normal(self, name: str, *shape: int) -> None:
        self.tensors[name] = (torch.randn(*shape, generator=self.random) * 0.02).bfloat16()

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size, dtype=torch.bfloat16)

    def fp8(self, name: str, rows: int, columns: int) -> None:
        values = (torch.randn(rows, columns, generator=self.random) * 100).clamp(-448, 448)
        self.tensors[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
        self.tensors[f"{name}.weight_scale_inv"] = torch.full((-(-rows // BLOCK), -(-columns // BLOCK)), 2e-4)

    def layer(self, number: int) -> None:
        config, name = self.config, f"model.layers.{number}"
        width = config["hidden_size"]
        self.ones(f"{name}.input_layernorm.weight", width)
        self.ones(f"{name}.post_attention_layernorm.weight", width)
        self.attention(f"{name}.self_attn")
        if number < config["first_k_dense_replace"]:
            self.mlp(f"{name}.mlp", config["intermediate_size"])
        else:
            self.normal(f"{name}.mlp.gate.weight", config["n_routed_experts"], width)
            self.tensors[f"{name}.mlp.gate.e_score_correction_bias"] = torch.zeros(config["n_routed_experts"])
            self.mlp(f"{name}.mlp.shared_experts", config["moe_intermediate_size"])
            for expert in range(config["n_routed_experts"]):
                self.mlp(f"{name}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if number >= config["num_hidden_layers"]:  # of multi-token prediction
            self.normal(f"{name}.embed_tokens.weight", config["vocab_size"], width)
            self.normal(f"{name}.shared_head.head.weight", config["vocab_size"], width)
            for norm in ("shared_head.norm", "enorm", "hnorm"):
                self.ones(f"{name}.{norm}.weight", width)
            self.normal(f"{name}.eh_proj.weight", width, 2 * width)

    def attention(self, name: str) -> None:
        config = self.config
        width, heads = config["hidden_size"], config["num_attention_heads"]
        queries, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        self.fp8(f"{name}.q_a_proj", queries, width)
        self.ones(f"{name}.q_a_layernorm.weight", queries)
        self.fp8(f"{name}.q_b_proj", heads * config["qk_head_dim"], queries)
        self.fp8(f"{name}.kv_a_proj_with_mqa", latent + rope, width)
        self.ones(f"{name}.kv_a_layernorm.weight", latent)
        self.fp8(f"{name}.kv_b_proj", heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), latent)
        self.fp8(f"{name}.o_proj", width, heads * config["v_head_dim"])
        size = config["index_head_dim"]
        self.fp8(f"{name}.indexer.wq_b", config["index_n_heads"] * size, queries)
        self.fp8(f"{name}.indexer.wk", size, width)
        self.normal(f"{name}.indexer.weights_proj.weight", config["index_n_heads"], width)
        self.ones(f"{name}.indexer.k_norm.weight", size)
        self.tensors[f"{name}.indexer.k_norm.bias"] = torch.zeros(size, dtype=torch.bfloat16)

    def mlp(self, name: str, inner: int) -> None:
        width = self.config["hidden_size"]
        self.fp8(f"{name}.gate_proj", inner, width)
        self.fp8(f"{name}.up_proj", inner, width)
        self.fp8(f"{name}.down_proj", width, inner)

    def save(self, directory: Path) -> None:
        names = list(self.tensors)
        share = -(-len(names) // FILES)
        where: dict[str, str] = {}
        for number in range(FILES):
            file, part = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors", names[number * share :][:share]
            save_file({name: self.tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
            where |= dict.fromkeys(part, file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        print(f"{len(names)} tensors, {size} bytes")


def main() -> None:
    tokenizer, directory = map(Path, sys.argv[1:])
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = {**CONFIG, "vocab_size": len(vocabulary)}
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    Weights(config).save(directory)


if __name__ == "__main__":
    main()
