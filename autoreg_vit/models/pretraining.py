"""Pretraining models: encoder x serialization x decoder x target.

`AutoregressiveViT` composes four independent parts; RandSAC, SAIM and every ablation of both papers are keyword
arguments of `compose`, and of the models that `designs.py` registers with timm.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from timm.layers import Mlp, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._compat import refit_positions
from ..errors import ModelError, SerializationError, ShapeError
from ..serialization import Layout, Serialization, check_ranks
from .attention import check_encoder, content_block, run_block
from .decoders import Decoder, MaskedDecoder, NextTokenDecoder, ParallelDecoder
from .embedding import embed_patches
from .encoders import SinCosVisionTransformer, check_sizes, init_xavier
from .interface import attention_of, blocks_of, mlp_width, positions_of
from .mixing import autocast_dtype
from .targets import PixelTarget

__all__ = ['AutoregressiveViT', 'PretrainOutput', 'compose']


class PretrainOutput(NamedTuple):
    """Result of a pretraining step; predictions and targets are in raster order.

    loss: Mean squared error, a scalar.
    pred: Predictions [B, N, P * P * C], normalised as the targets are. Tokens of a first segment that is given are not
        predicted: their targets stand in the place.
    target: Targets [B, N, P * P * C].
    ranks: The ranks used, int64 [B, N].
    """
    loss: torch.Tensor
    pred: torch.Tensor
    target: torch.Tensor
    ranks: torch.Tensor


class AutoregressiveViT(nn.Module):
    """Autoregressive pretraining of a Vision Transformer over segments of an image.

    Its forward pass takes the encoder's blocks apart, to give attention its limits: forward hooks on the blocks and
    their `attn` do not fire here, those on layers within do.

    Args:
        encoder: A timm VisionTransformer; its position embedding is frozen here. `model.encoder` stays a model of its
            own, with plain attention.
        first_segment: 'self', the first segment attends to its own encoding (RandSAC 4.1), 'none', or 'given', it is
            left out of the loss (AIM).
        head: 'linear', or 'mlp', one hidden layer of the encoder's MLP width (SAIM "Decoder").
        encode_ratio: Part of the tokens in sorted order, rounded to whole ones, that the encoder takes.
        encode_last: Encode the last segment although no prediction reads it.

    Raises:
        ModelError: for an encoder or option that cannot be pretrained this way.
        SerializationError: for an order that the decoder cannot follow.
    """
    #: Under autocast, whether the sum that blocks add to is kept in float32, as timm's encoders keep it, or in
    #: autocast's dtype, which is half as much to read and write; `autoreg-vit pretrain` does the latter by default.
    residual_in_fp32 = True
    #: Set by `timm.create_model`: the arguments that made it, and timm's configuration of its weights.
    init_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def __init__(
            self, encoder: VisionTransformer, serialization: Serialization, decoder: Decoder, target: PixelTarget,
            first_segment: str = 'self', head: str = 'linear', encode_ratio: float = 1.0, encode_last: bool = True):
        super().__init__()
        check_encoder(encoder)
        if first_segment not in ('self', 'none', 'given'):
            raise SerializationError(f"first_segment is 'self', 'none' or 'given', got {first_segment!r}.")
        if isinstance(decoder, NextTokenDecoder):
            _check_next_token(serialization, first_segment, encode_ratio)
        if isinstance(encode_ratio, bool) or not isinstance(encode_ratio, (int, float)) or not 0 < encode_ratio <= 1:
            raise ModelError(f'encode_ratio is a part of the tokens above 0 and at most 1, got {encode_ratio!r}.')
        if head not in ('linear', 'mlp'):
            raise ModelError(f"head is 'linear' or 'mlp', got {head!r}.")
        self.encoder = encoder
        positions_of(encoder).requires_grad_(False)
        self.serialization = serialization
        self.decoder = decoder
        self.target = target
        self.first_segment = first_segment
        self.encode_ratio = encode_ratio
        self.encode_last = encode_last
        values = target.patch_size[0] * target.patch_size[1] * encoder.patch_embed.proj.in_channels
        self.head: nn.Module = (
            Mlp(decoder.dim, mlp_width(encoder), values) if head == 'mlp' else nn.Linear(decoder.dim, values))
        self.head.apply(init_xavier)
        self.num_classes = 0
        self.num_features = encoder.num_features

    def forward(self, images: torch.Tensor, ranks: torch.Tensor | None = None) -> PretrainOutput:
        """Predict every token from the segments before its own.

        Args:
            images: [B, C, H, W], floating point, of the encoder's image size.
            ranks: int64 [B, N] in raster order; drawn from the model's serialization where None.

        Raises:
            ShapeError: for images or ranks of another shape or dtype.
            SerializationError: for ranks that the decoder cannot follow.
        """
        self._check_images(images)
        if ranks is None:
            ranks = self.draw_ranks(images.shape[0], device=images.device)
        else:
            self._check_ranks(ranks, images.shape[0])  # len() would be a constant to torch.export
            ranks = ranks.to(images.device)
        layout = self._layout(ranks)
        features = self.decoder(self.encode(images, layout), layout, self.encoder)
        pred = layout.unsort(self.head(features))
        target = self.target(images)
        predicted = None
        if self.first_segment == 'given':
            predicted = ranks > 0
            pred = torch.where(predicted[..., None], pred, target)
        return PretrainOutput(self.target.loss(pred, target, predicted), pred, target, ranks)

    def encode(self, images: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
        """The input of the encoder's first block and the output of every block under source limits, each
        [B, prefix + encoded, C] in sorted order."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        x = embed_patches(encoder, images, layout)
        if prefix:
            tokens: list[torch.Tensor] = [t for t in (encoder.cls_token, encoder.reg_token) if t is not None]
            front = torch.cat(tokens, dim=1) + positions_of(encoder)[:, :prefix]
            x = torch.cat([front.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = encoder.norm_pre(encoder.pos_drop(x))
        if not self.residual_in_fp32 and (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)
        hidden = [x]
        for block in encoder.blocks:
            hidden.append(run_block(encoder, content_block, block, hidden[-1], layout.encoder_limits))
        return hidden

    def draw_ranks(
            self, batch: int, *, generator: torch.Generator | None = None,
            device: torch.device | str | None = None) -> torch.Tensor:
        """Ranks of `batch` images from the model's serialization, int64 [batch, N]."""
        return self.serialization(batch, generator=generator, device=device)

    def _layout(self, ranks: torch.Tensor) -> Layout:
        """The order and limits of ranks [B, N], with as many tokens encoded as the options say."""
        layout = Layout.of(ranks, self.first_segment, self.encoder.num_prefix_tokens)
        encoded = round(self.encode_ratio * ranks.shape[1])
        if not self.encode_last:
            last = self.serialization.last_segment
            if _host_reads(ranks):
                encoded = min(encoded, int(layout.read))
            elif last is not None:
                encoded = min(encoded, ranks.shape[1] - last)
        return layout.with_encoded(max(encoded, 1))

    def _check_ranks(self, ranks: torch.Tensor, batch: int) -> None:
        tokens = self.encoder.patch_embed.num_patches
        check_ranks(ranks, batch, tokens)
        if isinstance(self.decoder, NextTokenDecoder) and _host_reads(ranks):
            # Raster order, after a first segment of any length where that is given.
            first = tokens - ranks[:, -1:] if self.first_segment == 'given' else 1
            if (ranks != (torch.arange(tokens, device=ranks.device) + 1 - first).clamp(min=0)).any():
                raise SerializationError("decoder='none' follows raster order alone: leave ranks out.")

    def _check_images(self, images: torch.Tensor) -> None:
        channels, size = self.encoder.patch_embed.proj.in_channels, tuple(self.encoder.patch_embed.img_size)
        if images.ndim != 4 or images.shape[1] != channels or tuple(images.shape[2:]) != size:
            raise ShapeError(
                f'This model takes images [B, {channels}, {size[0]}, {size[1]}], got {list(images.shape)}. Create it '
                'with another img_size or in_chans, or call model.set_input_size((height, width)).')
        if not images.is_floating_point():
            raise ShapeError(f'Images must be floating point and normalised, got {images.dtype}.')

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size in pixels: position embeddings are resampled or recomputed, and the serialization
        draws on the new grid."""
        patch = self.encoder.patch_embed.patch_size
        check_sizes(img_size, patch)
        height, width = to_2tuple(img_size)
        grid = (height // patch[0], width // patch[1])
        self.serialization = replace(self.serialization, grid=grid)
        positions, before = self.encoder.pos_embed, self.encoder.patch_embed.grid_size
        self.encoder.set_input_size(img_size=(height, width))
        refit_positions(self.encoder, positions, before)
        if isinstance(self.decoder, MaskedDecoder):
            self.decoder.set_grid(grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute encoder and decoder blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory leaves without weight decay."""
        return {f'encoder.{n}' for n in self.encoder.no_weight_decay()} | {
            'encoder.reg_token', 'decoder.pos_embed', 'decoder.mix', 'decoder.start'}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's layer decay: encoder blocks, then decoder blocks, then head."""
        return dict(
            stem=r'^encoder\.(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre)',
            blocks=[(r'^encoder\.blocks\.(\d+)', None), (r'^encoder\.norm', (99998,)), (r'^decoder', (99999,)),
                    (r'^head', (100000,))])


def _host_reads(ranks: torch.Tensor) -> bool:
    """Whether the host may read values of `ranks`: not in a compiled step, nor while a CUDA graph is captured."""
    return not (torch.compiler.is_compiling() or (ranks.is_cuda and torch.cuda.is_current_stream_capturing()))


def _check_next_token(serialization: Serialization, first_segment: str, encode_ratio: float) -> None:
    """Raise an error for what `decoder='none'` cannot follow."""
    if serialization.name not in ('raster', 'prefix_raster'):
        raise SerializationError(
            f"decoder='none' predicts the next token in raster order, since nothing tells it the position of any "
            f"other: got serialization={serialization.name!r}. Use serialization='raster' or 'prefix_raster', or "
            "decoder='masked' or 'parallel'.")
    if serialization.name == 'prefix_raster' and first_segment != 'given':
        raise SerializationError(
            f"decoder='none' would predict tokens of the first segment from encodings that have seen them: with "
            f"serialization='prefix_raster' it needs first_segment='given', got {first_segment!r}.")
    if encode_ratio != 1:
        raise ModelError(f"decoder='none' predicts each token from the encoding of the one before, so that all are "
                         f"needed: leave encode_ratio out (got {encode_ratio!r}), or use decoder='masked' or "
                         "'parallel'.")


def compose(
        *, serialization: str, decoder: str, segments: int | Sequence[int] | None = None, shuffle: bool = False,
        segment_order: str = 'random', decoder_depth: int | None = None, decoder_dim: int | None = None,
        decoder_heads: int | None = None, memory: str | None = None, mix_init: str | None = None, shared: bool = False,
        first_segment: str = 'self', encode_ratio: float = 1.0, encode_last: bool = True, head: str = 'linear',
        norm_pix: bool = True, blur: Sequence[float] | bool | None = None, **encoder_options: Any) -> AutoregressiveViT:
    """A pretraining model from keyword arguments; those of `timm.create_model('randsac_vit_tiny', ...)` end here.

    Args:
        serialization: 'raster', 'random', 'squares' or 'blobs' (RandSAC 3.1-3.3; SAIM "Stochastic prediction"), or
            'prefix_raster', raster order after a first segment of random length (AIM, with first_segment='given').
        decoder: 'masked' (RandSAC 4.1), 'parallel' (SAIM; RandSAC's two-stream with shared=True) or 'none' (ViT-iGPT,
            AIM; raster order only).
        segments: Segments a level of squares or blobs, finest first (RandSAC 3.3, Table 7).
        shuffle: Break the coherence of squares or blobs (RandSAC Table 6).
        segment_order: Squares or blobs one after the other in 'random' order (RandSAC 3.3) or in 'raster' order (XTRA's
            block causal mask, with squares).
        decoder_depth: Layers of the decoder; for 'parallel' a divisor of the encoder's depth (SAIM Table 3), all of it
            by default.
        decoder_dim: Width of the masked decoder, the encoder's by default.
        decoder_heads: Heads of the masked decoder, the encoder's by default.
        memory: 'mix' (RandSAC 4.2, default) or 'last' for 'masked'; for 'parallel' 'output' (SAIM's published code,
            default) or 'input' (SAIM Eq. 5 and XLNet, default with shared=True) of the encoder block beside.
        mix_init: What the weights of memory='mix' start as: 'last', the last layer alone (default), or 'uniform'.
        shared: Decode with the encoder's own blocks (RandSAC Table 8, SAIM Table 3).
        first_segment: 'self' lets it attend to its own encoding (RandSAC 4.1), 'none' does not (SAIM), 'given' is
            context, left out of the loss (AIM), which is then the mean over images of each image's mean.
        encode_ratio: Part of the tokens, the first in the order of prediction, that the encoder takes; predictions of
            all tokens read the earlier ones among them. 1 in both papers.
        encode_last: False leaves out the last segment's encoding, which no prediction reads: the same loss from a
            cheaper step, and rounding alone differs. A batch encodes as many tokens as the image that needs most, which
            saves next to nothing with blobs. The host reads that number from the device at each step; in a compiled
            step, and while a CUDA graph is captured, the serialization gives it, to which ranks must then belong, and
            blobs are encoded whole.
        head: 'linear' or 'mlp' (SAIM).
        norm_pix: Normalise target patches (RandSAC 5, Tables 12-14; SAIM's published command).
        blur: Gaussian kernel size and sigma on the target image (SAIM Eq. 7, Table 3), or None or False for none.
            timm.create_model drops arguments that are None, so that there None is the model's default, a blur of
            SAIM's: turn it off with False.
        **encoder_options: Arguments of timm's VisionTransformer: img_size, patch_size, in_chans, embed_dim, depth, ...

    Raises:
        ModelError, SerializationError, ShapeError: for values that do not work, or options without effect here.
    """
    encoder = SinCosVisionTransformer(**{**encoder_options, 'num_classes': 0})
    check_encoder(encoder)
    grid = tuple(encoder.patch_embed.grid_size)
    given = dict(decoder_depth=decoder_depth, decoder_dim=decoder_dim, decoder_heads=decoder_heads, memory=memory,
                 mix_init=mix_init, shared=shared or None)
    takes = {'masked': ('decoder_depth', 'decoder_dim', 'decoder_heads', 'memory', 'mix_init'),
             'parallel': ('decoder_depth', 'memory', 'shared'), 'none': ()}
    if decoder not in takes:
        raise ModelError(f"decoder is 'masked', 'parallel' or 'none', got {decoder!r}.")
    for option, value in given.items():
        if value is not None and option not in takes[decoder]:
            raise ModelError(f'{option}={value!r} has no effect with decoder={decoder!r}: leave it out. That decoder '
                             f'takes {", ".join(takes[decoder]) or "no options"}.')
    part: Decoder
    if decoder == 'masked':
        part = MaskedDecoder(
            encoder, encoder.embed_dim if decoder_dim is None else decoder_dim,
            3 if decoder_depth is None else decoder_depth,
            attention_of(blocks_of(encoder)[0]).num_heads if decoder_heads is None else decoder_heads,
            memory or 'mix', mix_init)
    elif decoder == 'parallel':
        part = ParallelDecoder(encoder, len(encoder.blocks) if decoder_depth is None else decoder_depth, shared,
                               memory or ('input' if shared else 'output'))
    else:
        part = NextTokenDecoder(encoder, first_segment != 'given')
    model = AutoregressiveViT(
        encoder,
        # It makes whatever it takes for segments a tuple.
        Serialization(serialization, grid, cast('tuple[int, ...] | None', segments), shuffle, segment_order),
        part,
        PixelTarget(
            tuple(encoder.patch_embed.patch_size), encoder.patch_embed.proj.in_channels, norm_pix, blur or None),
        first_segment, head, encode_ratio, encode_last)
    return model.to(device=encoder_options.get('device'), dtype=encoder_options.get('dtype'))


PRETRAINING_OPTIONS = [p for p in inspect.signature(compose).parameters if p != 'encoder_options']
