"""Prompts to context with CLIP's tokenizer and text encoder (Radford et al. 2021).

    prompt --parse_prompt--> weighted pieces --tokenizer--> tokens --split_chunks--> chunks of L - 2 tokens
    chunk  --> BOS, tokens, EOS, pads --CLIP--> (L, D) --emphasize--> (L, D);  the chunks of a prompt are joined along L

Text that looks like a special token ("<|endoftext|>", or "!", the pad token of SD2) is plain text here; transformers
and diffusers read it as the special token.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlite.config import TextConfig
from sdlite.contracts import TextFeatures
from sdlite.models.prompt import Piece, Token, escaped, parse_prompt, split_chunks

MAX_CHUNKS = 64  # 4,800 tokens for SD: enough for the longest prompt of English words that a Request takes
WORD_END = "</w>"  # end of a word's last token in CLIP's vocabulary
CACHED_CHUNKS = 256  # about 60 MB for SD1 in float32
MIN_MEAN = 1e-3  # of the mean magnitude; below it a mean is rounding noise


class TextEncoder(nn.Module):
    """CLIP's text model with its tokenizer; starts in eval mode with random weights in `model`.

    It may be built under torch.device("meta") and filled with
    `encoder.model.load_state_dict(text_state_dict(weights), assign=True)`.
    The encoder changes the tokenizer that it is given: it sets the pad token and the length from config.
    Raises ValueError if tokenizer and config do not fit each other.
    """

    def __init__(self, config: TextConfig, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        _check_fit(config, tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        tokenizer.model_max_length = config.max_position_embeddings
        self.config = config
        self.tokenizer = tokenizer
        self.model = CLIPTextModel(CLIPTextConfig(**config.model_dump(), attn_implementation="sdpa"))
        # No checkpoint has this buffer, so nothing would fill it after a start on the meta device.
        self.model.embeddings.position_ids = torch.arange(config.max_position_embeddings, device="cpu")[None]
        self._comma: int | None = tokenizer.get_vocab().get(",</w>")
        self._cache: OrderedDict[tuple[tuple[Token, ...], int], Tensor] = OrderedDict()
        self._cached_weights: tuple[tuple[int, int], ...] = ()
        self.eval()

    def num_chunks(self, prompt: str) -> int:
        """How many chunks of L rows `encode` makes of a prompt. Raises ValueError beyond MAX_CHUNKS."""
        return len(self._chunks(prompt))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, clip_skip: int = 0) -> TextFeatures:
        """Features of B prompts on the model's device: a context (B, n L, D), and no `pooled`.

        L is max_position_embeddings, 77 for SD. n is the chunk count of the longest prompt; empty chunks are added to
        shorter prompts.
        clip_skip: number of last layers to skip; the final layer norm is still applied, as in diffusers.
        Each chunk is encoded alone, so a prompt's context does not depend on its neighbours. Chunks are cached until
        the weights change. Raises ValueError for a clip_skip beyond the layers.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts={prompts!r:.80} must be a list of at least one text")
        layers = self.config.num_hidden_layers
        if not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip} must be 0 to {layers}, the layers of this text encoder")
        rows = [self._chunks(prompt) for prompt in prompts]
        count = max(len(row) for row in rows)
        self._forget_changed()
        padded = [row + [[]] * (count - len(row)) for row in rows]
        contexts = [torch.cat([self._features(chunk, clip_skip) for chunk in row]) for row in padded]
        return TextFeatures(torch.stack(contexts))

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Words of a prompt in order, in the tokenizer's spelling, each with its rows of the context of `encode`.

        Punctuation counts as words of its own. The rows of start, end and padding belong to no word.
        """
        words: list[tuple[str, list[int]]] = []
        ids: list[int] = []
        rows: list[int] = []
        for first, chunk in enumerate(self._chunks(prompt)):
            for i, token in enumerate(chunk):
                ids.append(token.id)
                rows.append(first * self.config.max_position_embeddings + 1 + i)
                if self.tokenizer.convert_ids_to_tokens(token.id).endswith(WORD_END):
                    words.append((self.tokenizer.decode(ids).strip(), rows))
                    ids, rows = [], []
        return words

    def caption_tokens(self, caption: str) -> tuple[list[int], bool]:
        """Ids of a caption's first chunk, without start and end, and whether that is the whole caption.

        Models are trained on these. Brackets are plain text; `encode` uses the same tokens for the escaped caption.
        """
        chunks = self._split(escaped(caption))
        return [token.id for token in chunks[0]], len(chunks) == 1

    def _split(self, prompt: str) -> list[list[Token]]:
        sections = [self._tokens(pieces) for pieces in parse_prompt(_checked(prompt))]
        return split_chunks(sections, self.config.max_position_embeddings - 2, self._comma)

    def _chunks(self, prompt: str) -> list[list[Token]]:
        """Weighted tokens of a prompt in chunks of up to L - 2."""
        chunks = self._split(prompt)
        if len(chunks) > MAX_CHUNKS:
            raise ValueError(f"prompt is too long: {len(chunks)} chunks of tokens, at most {MAX_CHUNKS} are possible")
        return chunks

    def _tokens(self, pieces: Sequence[Piece]) -> list[Token]:
        """Tokens of a section. Each piece is tokenized alone, as in Automatic1111."""
        texts = [piece.text for piece in pieces]
        ids: list[list[int]] = []
        if texts:
            # verbose=False: no warning about texts longer than one chunk
            ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [Token(i, piece.weight) for piece, row in zip(pieces, ids, strict=True) for i in row]

    def _features(self, chunk: Sequence[Token], clip_skip: int) -> Tensor:
        """(L, D) features of a chunk, from the cache if possible; in training mode nothing is cached."""
        if self.training:
            return self._encode_chunk(chunk, clip_skip)
        key = (tuple(chunk), clip_skip)
        features = self._cache.pop(key, None)
        if features is None:
            features = self._encode_chunk(chunk, clip_skip)
        self._cache[key] = features  # the last is the most recently used
        if len(self._cache) > CACHED_CHUNKS:
            self._cache.popitem(last=False)
        return features

    def _encode_chunk(self, chunk: Sequence[Token], clip_skip: int) -> Tensor:
        config = self.config
        num_pads = config.max_position_embeddings - 2 - len(chunk)
        ids = [config.bos_token_id, *(token.id for token in chunk), config.eos_token_id]
        tokens = torch.tensor([ids + [config.pad_token_id] * num_pads], device=self.model.device)  # (1, L)
        if clip_skip == 0:
            z: Tensor = self.model(tokens).last_hidden_state[0]  # (L, D)
        else:
            states = self.model(tokens, output_hidden_states=True).hidden_states  # num_hidden_layers + 1 of (1, L, D)
            z = self.model.final_layer_norm(states[-(clip_skip + 1)])[0]  # (L, D)
        weights = [1.0, *(token.weight for token in chunk), 1.0] + [1.0] * num_pads
        return z if all(weight == 1 for weight in weights) else emphasize(z, z.new_tensor(weights))

    def _forget_changed(self) -> None:
        """Empties the cache if a weight was replaced or written to since it was filled."""
        weights = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in self.model.parameters())
        if weights != self._cached_weights:
            self._cache.clear()
            self._cached_weights = weights

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; also empties the cache, because an optimizer can change weights without a new version."""
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in nn.Module, whose `to`, `half` and others call it; also empties the cache."""
        self._cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def emphasize(z: Tensor, weights: Tensor) -> Tensor:
    """Features of one chunk times the weights of their tokens, scaled back to the mean they had.

    z: (L, D). weights: (L,). Automatic1111's emphasis "Original", which takes the mean over a chunk of all prompts of a
    batch; here it is over the chunk alone, which is the same for one prompt and keeps a prompt independent of others.
    Where a mean is about 0 or changes its sign the scale would be noise, and the features stay z * weights.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_emphasis.py, EmphasisOriginal.
    """
    weighted = z * weights[:, None]  # (L, D)
    precise = torch.promote_types(z.dtype, torch.float32)
    before, after = z.mean(dtype=precise), weighted.mean(dtype=precise)
    smallest = MIN_MEAN * z.abs().mean(dtype=precise)
    if before * after <= 0 or before.abs() < smallest or after.abs() < smallest:
        return weighted
    return weighted * (before / after).to(z.dtype)


def text_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `TextEncoder.model.load_state_dict` takes them, from either layout of transformers' names.

    Before transformers 5.6 names began with "text_model."; since then they do not. Leaves out position_ids, a buffer
    that some tools saved as rounded floats. Raises ValueError if a tensor has both names.
    """
    flat = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    if len(flat) != len(weights):
        twice = next(name for name in flat if name in weights and f"text_model.{name}" in weights)
        raise ValueError(f"text encoder weights have {twice} twice: with and without 'text_model.' in front")
    flat.pop("embeddings.position_ids", None)
    return flat


def saved_text_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the older names ("text_model."), which every release of transformers reads."""
    return {f"text_model.{name}": tensor for name, tensor in text_state_dict(weights).items()}


def _check_fit(config: TextConfig, tokenizer: CLIPTokenizer) -> None:
    """Raises ValueError where config and tokenizer contradict each other or the model cannot be built."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ValueError(f"hidden_size={width} must be a multiple of num_attention_heads={heads}")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(config, name) != getattr(tokenizer, name):
            raise ValueError(f"{name}={getattr(config, name)} must be the tokenizer's, {getattr(tokenizer, name)}")
    ids = tokenizer.get_vocab().values()
    if max(ids) >= config.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size} must be above {max(ids)}, the tokenizer's highest id")
    if config.pad_token_id not in ids:
        raise ValueError(f"pad_token_id={config.pad_token_id} must be one of the tokenizer's ids")


def _checked(prompt: str) -> str:
    """The prompt. Raises ValueError if UTF-8 cannot write it: JSON can spell half of a surrogate pair."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be text: character {error.start} is half of a surrogate pair") from None
    return prompt
