"""The adapter between CLIP's text features and the UNet's context."""

from __future__ import annotations

from torch import Tensor, nn


class TextAdapter(nn.Module):
    """texts + gamma * MLP(texts) (VPD, equation 4): one module for all three tasks, which differ in shapes only."""

    def __init__(self, text_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or text_dim
        self.fc = nn.Sequential(nn.Linear(text_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, text_dim))

    def forward(self, texts: Tensor, gamma: Tensor) -> Tensor:
        """texts (..., text_dim), gamma (text_dim,) -> (..., text_dim)."""
        return texts + gamma * self.fc(texts)
