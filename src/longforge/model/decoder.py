"""The decoder: embedding, pre-norm layers, final norm."""

from torch import Tensor, nn

from longforge.model.attention import mixer
from longforge.model.config import LayerSpec, ModelConfig
from longforge.model.experts import DenseFeedForward, MixtureOfExperts
from longforge.model.norms import RMSNorm
from longforge.model.step import Step

__all__ = ["Decoder", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = mixer(config, spec.mixer, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        dense = spec.feed_forward == "dense"
        self.mlp = DenseFeedForward(config, config.dense_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [N, d] -> [N, d]."""
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x), step)


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, spec, i) for i, spec in enumerate(config.layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def forward(self, ids: Tensor, step: Step) -> Tensor:
        """ids int64 [N] -> hidden [N, d] after the final norm."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)
