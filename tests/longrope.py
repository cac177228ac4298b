"""Rotary embeddings with a table for the original length and another beyond it."""

from lab import tiny_models

FACTORS = {
    "short_factor": [1 + i / 100 for i in range(16)],
    "long_factor": [1.0 + i for i in range(16)],
}
VARIANTS = {
    "longrope": FACTORS
    | {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 256,
    },
    "longrope, partial": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 0.75,
        **{name: factors[:12] for name, factors in FACTORS.items()},
    },
}


def runs(folder, settings):
    """Engines of which one stays within the original length and the other goes beyond."""
    return [
        {
            "model": tiny_models.save(
                folder / name,
                "Phi3ForCausalLM",
                pad_token_id=0,
                original_max_position_embeddings=512,
                rope_parameters=VARIANTS[name]
                | {"original_max_position_embeddings": 512},
            ),
            "max_model_len": length,
            "skip_tokenizer_init": True,
        }
        | settings
        for name, length in (("longrope", 512), ("longrope, partial", 1024))
    ]
