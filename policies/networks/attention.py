"""Attention that transformers of this room share; N tokens, d their width, H heads."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, d] -> [B, H, N, d / H]."""
    return tokens.reshape(*tokens.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[B, H, N, d / H] -> [B, N, d]."""
    return tokens.transpose(1, 2).flatten(2)


def check_heads(width: int, heads: int) -> None:
    """Refuse a width that the heads cannot share equally."""
    if heads < 1 or width % heads:
        raise PolicyError(f"the width of a transformer must be a multiple of its heads, got {width} and {heads}")


@final
class SelfAttention(nn.Module):
    """Tokens [B, N, d] look at each other, or with `causal` at earlier ones and themselves only."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        query, key, value = (split_heads(part, self.heads) for part in self.project(tokens).chunk(3, dim=2))
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        out: Tensor = self.output(merge_heads(seen))
        return out


@final
class CrossAttention(nn.Module):
    """Tokens [B, N, d] look at a memory whose keys and values were computed beforehand."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tokens [B, N, d], key and value [B, H, M, d / H] -> [B, N, d]."""
        dropout = self.dropout if self.training else 0.0
        query = split_heads(self.query(tokens), self.heads)
        out: Tensor = self.output(merge_heads(F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)))
        return out


@final
class FeedForward(nn.Sequential):
    """Perceptron on every token, [..., d] -> [..., d]."""

    def __init__(self, width: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(expansion * width, width)
        )
