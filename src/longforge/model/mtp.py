"""Multi-token prediction: each module guesses one token further (DeepSeek-V3; M2 report, section 2.3)."""

import torch
from torch import Tensor, nn

from longforge.model.config import ModelConfig
from longforge.model.decoder import DecoderLayer
from longforge.model.norms import RMSNorm
from longforge.model.step import Step

__all__ = ["MTPModule"]


class MTPModule(nn.Module):
    """hidden of position t and the embedding of token t+1 -> the hidden state that predicts token t+2.

    Both are normalised, concatenated (embedding first) and projected to d; then one transformer block of the
    last layer's kind. Embedding table and output head belong to the main model.
    """

    def __init__(self, config: ModelConfig, module: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config)
        self.hnorm = RMSNorm(config.hidden_size, config)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.transformer_layer = DecoderLayer(config, config.mtp_spec, len(config.layers) + module)
        self.final_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, hidden: Tensor, next_embedding: Tensor, step: Step) -> Tensor:
        """hidden [N, d], embeddings [N, d] of the tokens one further -> [N, d] after the final norm."""
        both = torch.cat([self.enorm(next_embedding), self.hnorm(hidden)], dim=-1)
        return self.final_layernorm(self.transformer_layer(self.eh_proj(both), step))
