"""Decoders: from the encoder's hidden states to one feature a token, from which a head predicts its pixels.

Each is called as `decoder(hidden, layout, encoder)`: `hidden` holds the input of the encoder's first block and the
output of every block, [B, prefix + encoded, C] in sorted order, of all N tokens or of the first `layout.encoded`; the
result is [B, N, `decoder.dim`] in sorted order. The encoder is lent, not owned, so that shared weights are stored once.
"""

import copy

import torch
from timm.layers import Attention, LayerNorm, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .. import ops
from ..errors import ModelError
from ..serialization import Layout
from .attention import add_to, query_block, run_block, self_attention
from .encoders import check_sizes, init_xavier, sincos_position_embedding
from .interface import mlp_width, positions_of
from .mixing import mix_layers


class CrossAttention(nn.Module):
    """Multi-head attention from queries of width `dim` to a memory of width `memory_dim`, under limits."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # [B, Nq, H, D]
        kv = self.kv(memory).unflatten(-1, (2, self.num_heads, -1))  # [B, Nk, 2, H, D]
        return self.proj(ops.segment_attention_kvpacked(q, kv, limits).flatten(2))


class DecoderBlock(nn.Module):
    """Transformer decoder layer with norms in front: self-attention, cross-attention, MLP (RandSAC 4.1, Fig. 4)."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.self_attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm3 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
            self, x: torch.Tensor, memory: torch.Tensor, query_limits: torch.Tensor,
            memory_limits: torch.Tensor) -> torch.Tensor:
        x = add_to(x, self_attention(self.self_attn, self.norm1(x), query_limits))
        x = add_to(x, self.cross_attn(self.norm2(x), memory, memory_limits))
        return add_to(x, self.mlp(self.norm3(x)))


class MaskedDecoder(nn.Module):
    """RandSAC's masked transformer decoder (4.1), optionally with trainable skip connections (4.2).

    Its input is a set of fixed position encodings; tokens of a segment see each other and earlier ones in
    self-attention, and the encodings of earlier segments in cross-attention.

    Args:
        memory: 'last', the encoder's last layer, or 'mix', Z^l = sum over k of W[l, k] H^k with a learned W (4.2). The
            encoder's final norm follows in both.
        mix_init: What W starts as: 'last', the last layer alone (the default), or 'uniform', the mean of all layers.
            The paper does not say.
    """

    def __init__(
            self, encoder: VisionTransformer, dim: int, depth: int, num_heads: int, memory: str = 'mix',
            mix_init: str | None = None):
        super().__init__()
        if memory not in ('mix', 'last'):
            raise ModelError(f"memory of the masked decoder is 'mix' or 'last', got {memory!r}.")
        if mix_init not in (None, 'last', 'uniform'):
            raise ModelError(f"mix_init is 'last' or 'uniform', got {mix_init!r}.")
        if mix_init and memory != 'mix':
            raise ModelError(f"mix_init={mix_init!r} has no effect with memory={memory!r}: leave it out, or use "
                             "memory='mix'.")
        if not isinstance(depth, int) or depth < 1:
            raise ModelError(f'decoder_depth must be a whole number of at least 1, got {depth}.')
        check_sizes(embed_dim=dim, num_heads=num_heads)
        self.dim = dim
        self.memory = memory
        self.grad_checkpointing = False
        # The MLP is as wide as the encoder's, in multiples of the width.
        mlp_ratio = mlp_width(encoder) / encoder.embed_dim
        self.pos_embed = nn.Parameter(torch.empty(0), requires_grad=False)
        self.set_grid(encoder.patch_embed.grid_size)
        self.blocks = nn.ModuleList(DecoderBlock(dim, encoder.embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.apply(init_xavier)
        if memory == 'mix':
            self.mix = nn.Parameter(torch.zeros(depth, len(encoder.blocks)))  # W of 4.2, [layer, encoder block]
            with torch.no_grad():
                if mix_init == 'uniform':
                    self.mix.fill_(1 / len(encoder.blocks))
                else:
                    self.mix[:, -1] = 1

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Compute the position encodings anew for another grid of tokens."""
        embedding = sincos_position_embedding(grid, self.dim)[None]
        self.pos_embed.data = embedding.to(self.pos_embed.device, self.pos_embed.dtype)

    def forward(self, hidden: list[torch.Tensor], layout: Layout, encoder: VisionTransformer) -> torch.Tensor:
        if self.memory == 'mix':
            memories = [encoder.norm(z) for z in mix_layers(self.mix, hidden[1:])]
        else:
            memories = [encoder.norm(hidden[-1])] * len(self.blocks)
        x = layout.sort(self.pos_embed).to(hidden[0].dtype)
        for block, memory in zip(self.blocks, memories):
            x = run_block(self, block, x, memory, layout.query_limits, layout.memory_limits)
        return self.norm(x)


class ParallelDecoder(nn.Module):
    """SAIM's query stream: cross-attention blocks beside the encoder's (SAIM Eq. 5), sharing the encoder's weights in
    the two-stream model of XLNet and RandSAC (4.2, Fig. 5 left).

    Queries start as position embeddings and end in the encoder's final norm. In SAIM's published code that norm is
    trained on the query stream and then used on the encoder's output.

    Args:
        depth: Query blocks; a divisor of the encoder's depth. Block m stands beside encoder block
            m * encoder depth / depth (SAIM Table 3, as in the published code).
        shared: Use the encoder's own blocks as query blocks; depth is then the encoder's.
        memory: 'output', query block m reads the output of its encoder block (SAIM's published code), or 'input', it
            reads that block's input, as in SAIM Eq. 5 and XLNet. 'input' needs shared weights: without them the
            encoder's last block would never be trained.
    """

    def __init__(self, encoder: VisionTransformer, depth: int, shared: bool = False, memory: str = 'output'):
        super().__init__()
        encoder_depth = len(encoder.blocks)
        if memory not in ('output', 'input'):
            raise ModelError(f"memory of the parallel decoder is 'output' or 'input', got {memory!r}.")
        if not isinstance(depth, int) or depth < 1 or encoder_depth % depth:
            fits = [d for d in range(1, encoder_depth + 1) if encoder_depth % d == 0]
            raise ModelError(f'decoder_depth of the parallel decoder must divide the {encoder_depth} encoder blocks: '
                             f'one of {fits}, got {depth}.')
        if shared and depth != encoder_depth:
            raise ModelError(f'With shared=True the query blocks are the encoder\'s {encoder_depth}: leave '
                             f'decoder_depth out (got {depth}).')
        if memory == 'input' and not shared:
            raise ModelError("memory='input' needs shared=True: without it no prediction depends on the encoder's last "
                             "block. Use memory='output'.")
        self.dim = encoder.embed_dim
        self.memory = memory
        self.grad_checkpointing = False
        self.stride = encoder_depth // depth
        self.blocks = None
        if not shared:
            self.blocks = nn.ModuleList(copy.deepcopy(block) for block in encoder.blocks[self.stride - 1::self.stride])
            self.blocks.apply(init_xavier)

    def forward(self, hidden: list[torch.Tensor], layout: Layout, encoder: VisionTransformer) -> torch.Tensor:
        blocks = encoder.blocks if self.blocks is None else self.blocks
        memories = hidden[self.stride::self.stride] if self.memory == 'output' else hidden[:-1]
        x = layout.sort(positions_of(encoder)[:, encoder.num_prefix_tokens:]).to(hidden[0].dtype)
        for block, memory in zip(blocks, memories):
            x = run_block(self, query_block, block, x, memory, layout.memory_limits)
        return encoder.norm(x)


class NextTokenDecoder(nn.Module):
    """No decoder: the encoder's output at one token predicts the next (ViT-iGPT: RandSAC 3.1, SAIM Table 1).

    The next token's position must be known, so the order is raster. The first token is predicted from the class token,
    which sees only itself, or from a learned start token where the encoder has none; where the first segment is given
    (AIM, `predicts_first=False`) there is no such prediction, and zeros stand in its place.
    """

    def __init__(self, encoder: VisionTransformer, predicts_first: bool = True):
        super().__init__()
        self.dim = encoder.embed_dim
        self.grad_checkpointing = False
        self.start = None
        if predicts_first and not encoder.num_prefix_tokens:
            self.start = nn.Parameter(torch.randn(1, 1, self.dim) * 0.02)

    def forward(self, hidden: list[torch.Tensor], layout: Layout, encoder: VisionTransformer) -> torch.Tensor:
        prefix, tokens = encoder.num_prefix_tokens, layout.order.shape[1]
        x = encoder.norm(hidden[-1])
        if prefix:
            return x[:, prefix - 1:prefix + tokens - 1]
        if self.start is None:
            first = x.new_zeros(x.shape[0], 1, self.dim)
        else:
            first = self.start.expand(x.shape[0], -1, -1).to(x.dtype)
        return torch.cat([first, x[:, :tokens - 1]], dim=1)


Decoder = MaskedDecoder | ParallelDecoder | NextTokenDecoder
