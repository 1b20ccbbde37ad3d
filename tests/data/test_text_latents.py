"""Text and latent caches, pictures with captions, prompts alone: what they hold, and what they refuse."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.algebra.draws import Draws
from fewstep.algebra.sampling import Sampler
from fewstep.commands.cache_latents import cache_latents, pictures_hash
from fewstep.config import UserError
from fewstep.data.encoders import PipelineEncoder, SentenceEncoder
from fewstep.data.images import InMemory
from fewstep.data.latents import Encoder, Latents, decoder
from fewstep.data.pictures import Captions, Prompts, WebDataset
from fewstep.data.reader import View, scaled
from fewstep.data.tars import expand
from fewstep.data.text import embed
from fewstep.train.product import Product

PROMPTS = ("a red square", "two green dots", "blue", "a yellow line on grey")


def decode(data: bytes, size: int, grey: bool, name: str) -> Tensor:
    return scaled(View(size, grey).decode(data, name))


class Counting:
    """An encoder whose embedding is a function of the letters; it counts the prompts that it is given."""

    store = "fp32"

    def __init__(self, name: str = "one") -> None:
        self.name, self.seen = name, 0

    def key(self) -> str:
        return self.name

    def open(self, device: Any = "cpu") -> Any:
        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            self.seen += len(prompts)
            rows = [torch.tensor([float(ord(c)) for c in p.ljust(6)[:6]]) for p in prompts]
            text = torch.stack(rows)[:, :, None] * torch.tensor([1.0, 0.5])
            return {"text": text, "pooled": text.mean(1), "time_ids": torch.ones(len(prompts), 6)}

        return encode


def pictures(folder: Path, count: int = 5, size: tuple[int, int] = (10, 7)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(count):
        path = folder / f"p{i}.png"
        g = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        out.append(path)
    return out


def make_vae(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=5,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def refused(open_it: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_it()
    return str(caught.value)


def test_prompts_are_encoded_once_and_the_rows_are_the_encoders(tmp_path: Path):
    encoder = Counting()
    text = embed(encoder, PROMPTS, negative="ugly", cache=str(tmp_path), batch=3)
    assert encoder.seen == 5
    again = embed(Counting(), PROMPTS, negative="ugly", cache=str(tmp_path))
    k = torch.tensor([2, 0, 3])
    live = Counting().open()([PROMPTS[i] for i in k.tolist()])
    for t in (text, again):
        got = t.take(k)
        assert got.keys() == live.keys()
        assert all(torch.equal(got[n], live[n]) for n in live)
        null = t.null(got)
        ugly = Counting().open()(["ugly"])
        assert torch.equal(null["text"], ugly["text"].expand(3, -1, -1))
        assert torch.equal(null["pooled"], ugly["pooled"].expand(3, -1))
        assert torch.equal(null["time_ids"], got["time_ids"])
    zeros = embed(Counting(), PROMPTS, zeros=True, cache=str(tmp_path)).null(text.take(k))
    assert float(zeros["text"].abs().max()) == 0.0
    assert len(text) == 4
    for changed in ((Counting("two"), PROMPTS), (Counting(), PROMPTS[:3])):
        embed(changed[0], changed[1], negative="ugly", cache=str(tmp_path))
        assert changed[0].seen > 0


def test_another_negative_is_another_cache(tmp_path: Path):
    embed(Counting(), PROMPTS, negative="ugly", cache=str(tmp_path))
    plain = embed(Counting(), PROMPTS, negative="plain", cache=str(tmp_path))
    cond = plain.take(torch.tensor([1, 0]))
    wanted = Counting().open()(["plain"])
    for key in ("text", "pooled"):
        assert torch.equal(plain.null(cond)[key], wanted[key].expand_as(cond[key]))


def test_every_picture_keeps_its_caption(tmp_path: Path):
    files = pictures(tmp_path)
    for p, letter in zip(files, "abcde", strict=True):
        p.with_suffix(".txt").write_text(letter)
    spec = Captions(path=str(tmp_path), size=6, text_cache=str(tmp_path / "cache"))
    object.__setattr__(spec, "encoder", Counting())
    data = spec.open()
    x, cond = data.batch(Draws(1, torch.arange(30)))
    mine = torch.stack([decode(p.read_bytes(), 6, False, "") for p in files])
    which = [next(i for i in range(5) if torch.equal(row, mine[i])) for row in x]
    assert set(which) == set(range(5))
    wanted = Counting().open()(["abcde"[i] for i in which])
    assert all(torch.equal(cond[key], wanted[key]) for key in wanted)


def captioned(folder: Path, recipe: Path) -> list[Path]:
    files = pictures(folder)
    lines = [json.dumps({"file": p.name, "text": f"picture {i}"}) for i, p in enumerate(files)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    recipe.write_text(f"extends: digits-dmd2\ndata: {{name: captions, path: {folder}, size: 8}}\nevaluate: null\n")
    return files


def test_a_latent_cache_notices_that_a_picture_has_changed(tmp_path: Path):
    vae = make_vae(tmp_path / "vae")
    files = captioned(tmp_path / "data", tmp_path / "mine.yaml")
    options = {"vae": str(vae), "out": tmp_path / "latents", "batch": 2, "rows": 2}

    def cache() -> Any:
        return cache_latents(str(tmp_path / "mine.yaml"), [], **options)

    cache()
    (tmp_path / "latents" / "00001.safetensors").unlink()
    old = files[0].read_bytes()
    files[0].write_bytes(files[1].read_bytes())
    told = refused(cache)
    assert told.startswith(f"{tmp_path / 'latents'}: was made with another sha256 of the pictures, ")
    assert told.endswith("; choose another --out, or delete this folder")
    files[0].write_bytes(old)
    assert len(cache().missing()) == 0


def test_the_hash_of_pictures_is_of_contents_order_and_classes(tmp_path: Path):
    files = [p.read_bytes() for p in pictures(tmp_path / "p", 2)]

    def of(*samples: tuple[bytes, bytes]) -> str:
        parts = {f"{n}.{kind}": b for n, s in enumerate(samples) for kind, b in zip(("png", "cls"), s, strict=True)}
        make_tar(tmp_path / "t.tar", parts)
        return pictures_hash(WebDataset(shards=str(tmp_path / "t.tar"), size=6, classes=5).open())

    whole = of((files[0], b"1"), (files[1], b"2"))
    assert whole == of((files[0], b"1"), (files[1], b"2"))
    others = [
        of((files[1], b"1"), (files[0], b"2")),
        of((files[0], b"1"), (files[1], b"3")),
        of((files[0], b"1")),
        of((files[0], b"1"), (files[1] + b"\0", b"2")),
    ]
    assert len({whole, *others}) == 5
    x = torch.arange(24.0).reshape(2, 1, 3, 4)
    hashes = {
        pictures_hash(InMemory(images, labels, 4))
        for images, labels in ((x, None), (x + 1, None), (x.flip(0), None), (x, torch.tensor([0, 3])))
    }
    assert len(hashes) == 4


def test_latents_are_the_vaes_and_bound_to_it(tmp_path: Path):
    vae, other = make_vae(tmp_path / "vae"), make_vae(tmp_path / "other", seed=1)
    recipe = tmp_path / "mine.yaml"
    files = captioned(tmp_path / "data", recipe)
    done = cache_latents(str(recipe), [], str(vae), tmp_path / "latents", batch=2, rows=2)
    assert len(done) == 5
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "latents").glob("*.safetensors"))]
    assert len(before) == 3
    cache_latents(str(recipe), [], str(vae), tmp_path / "latents", batch=2, rows=2)
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "latents").glob("*.safetensors"))] == before
    k = torch.arange(5)
    x = torch.stack([decode(p.read_bytes(), 8, False, p.name) for p in files])
    mean, deviation = Encoder(str(vae))(x)
    latents = Latents(path=str(tmp_path / "latents"), vae=str(vae)).open()
    rows = latents.shards.take(k)
    torch.testing.assert_close(rows["mean"], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["std"], deviation, rtol=0, atol=1e-5)
    model: Any = Encoder(str(vae)).vae
    with torch.no_grad():
        raw = model.encode(x).latent_dist.mean
        torch.testing.assert_close(mean, (raw - 0.25) * 0.5, rtol=0, atol=1e-6)
        torch.testing.assert_close(decoder(str(vae))(mean), model.decode(raw).sample, rtol=0, atol=1e-5)
    assert latents.shape == (5, 4, 4)
    product = Product(torch.nn.Identity(), Sampler(), (5, 6, 4), 0, "x", None, vae=str(vae))
    assert product.picture_shape() == decoder(str(vae))(torch.zeros(1, 5, 6, 4)).shape[1:]
    draws = Draws(7, torch.arange(3))
    chosen = Draws(7, torch.arange(3))
    picked = chosen.integers(5)
    noise = chosen.normal_like(mean[:3])
    torch.testing.assert_close(latents.batch(draws)[0], mean[picked] + deviation[picked] * noise, rtol=0, atol=1e-5)
    still = Latents(path=str(tmp_path / "latents"), vae=str(vae), sample=False).open()
    torch.testing.assert_close(still.batch(Draws(7, torch.arange(3)))[0], mean[picked], rtol=0, atol=1e-5)
    told = refused(Latents(path=str(tmp_path / "latents"), vae=str(other)).open)
    assert "was made with another vae" in told
    assert f"make it again with `fewstep cache-latents RECIPE --vae {other}" in told
    assert "holds no index.json" in refused(Latents(path=str(tmp_path / "data"), vae=str(vae)).open)
    assert "no config.json with .safetensors" in refused(
        Latents(path=str(tmp_path / "latents"), vae=str(tmp_path / "data")).open
    )


def test_latents_keep_that_their_labels_are_not_their_folders_numbers(tmp_path: Path):
    vae, recipe, told = make_vae(tmp_path / "vae"), tmp_path / "mine.yaml", "class folder 1 has label 0, as there is no"
    for c in (1, 2):
        (tmp_path / "data" / str(c)).mkdir(parents=True)
        pictures(tmp_path / "data" / str(c), 1, (8, 8))
    captioned(tmp_path / "other", recipe)
    for more, kept in (({}, told), ({"renumber": True}, "")):
        settings = [f"data={json.dumps({'name': 'images', 'path': str(tmp_path / 'data')} | more)}"]
        out = tmp_path / f"latents{len(more)}"
        for _ in range(2):
            cache_latents(str(recipe), settings, str(vae), out)
        spec = Latents(path=str(out), vae=str(vae))
        assert spec.outline()[1] == spec.open().classes == 2
        assert spec.renumbered() == spec.open().renumbered
        assert spec.renumbered().startswith(kept)
        assert bool(spec.renumbered()) == bool(kept)


def test_a_cache_of_renumbered_classes_has_two_ways_out_and_one_of_before_is_taken_up(tmp_path: Path):
    vae, recipe, out = make_vae(tmp_path / "vae"), tmp_path / "mine.yaml", tmp_path / "latents"
    for c in (1, 2):
        (tmp_path / "data" / str(c)).mkdir(parents=True)
        pictures(tmp_path / "data" / str(c), 1, (8, 8))
    captioned(tmp_path / "other", recipe)

    def cached(**more: Any) -> str:
        cache_latents(str(recipe), [f"data={json.dumps({'name': 'images', 'path': str(tmp_path / 'data')} | more)}"],
                      str(vae), out)  # fmt: skip
        return Latents(path=str(out), vae=str(vae)).open().renumbered

    told = cached()
    assert told.startswith("class folder 1 has label 0")
    meant = Latents(path=str(out), vae=str(vae), renumber=True)
    assert meant.renumbered() == meant.open().renumbered == ""
    assert repr(meant) == repr(Latents(path=str(out), vae=str(vae)))
    shards = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert cached(renumber=True) == ""
    assert cached() == told
    # As it was made when nobody kept why; a folder that may not be written serves as it is.
    index = json.loads((out / "index.json").read_text())
    assert index["made_with"].pop("renumbered") == told
    (out / "index.json").write_text(json.dumps(index))
    assert cached() == told
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == shards


def test_pictures_are_resized_and_cut_to_the_middle(tmp_path: Path):
    for p in pictures(tmp_path, 1, (9, 5)):
        raw = torch.frombuffer(bytearray(Image.open(p).tobytes()), dtype=torch.uint8).reshape(5, 9, 3)
        want = raw[:, 2:7].permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(decode(p.read_bytes(), 5, False, "x"), want)
        assert decode(p.read_bytes(), 8, True, "x").shape == (1, 8, 8)
    assert refused(lambda: decode(b"none", 8, False, "where.png")).startswith("where.png: cannot be read")


def test_caption_folders_say_what_is_missing(tmp_path: Path):
    files = pictures(tmp_path)
    spec = Captions(path=str(tmp_path), size=6)
    assert refused(spec.open) == (
        f"{files[0]}: has no caption (5 of 5 have none); write p0.txt beside it, or captions.jsonl"
    )
    for i, p in enumerate(files):
        p.with_suffix(".txt").write_text(f" picture {i}\n")
    data = spec.open()
    assert [i.caption for i in data.items] == [f"picture {i}" for i in range(5)]
    assert data.shape == (3, 6, 6)
    x, cond = data.batch(Draws(1, torch.arange(4)))
    assert x.shape == (4, 3, 6, 6)
    assert cond is None
    told = tmp_path / "captions.jsonl"
    told.write_text('{"file": "p1.png", "text": "one"}\n\n{"file": "gone.png", "text": "x"}\n')
    assert refused(spec.open) == (
        f"{told}:3: names the picture gone.png, which is not in {tmp_path} (1 of 2 are missing); add the pictures or "
        "delete their lines"
    )
    told.write_text('{"file": "p1.png"}\n')
    assert refused(spec.open).startswith(f'{told}:1: expected {{"file": "NAME", "text": "CAPTION"}}')
    told.write_text('{"file": "p1.png", "text": "one"}')
    assert len(spec.open().items) == 1


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards_hold_pictures_captions_and_classes(tmp_path: Path):
    files = [p.read_bytes() for p in pictures(tmp_path / "p", 3)]
    make_tar(tmp_path / "t-00.tar", {"a.png": files[0], "a.txt": b"one", "b.png": files[1], "b.txt": b"two"})
    make_tar(tmp_path / "t-01.tar", {"x/c.png": files[2], "x/c.json": b'{"caption": "three"}', "x/c.cls": b"4"})
    pattern = str(tmp_path / "t-{00..01}.tar")
    data = WebDataset(shards=pattern, size=6).open()
    assert [i.caption for i in data.items] == ["one", "two", "three"]
    assert data.items[2].label == 4
    got = data.pictures(torch.tensor([2, 0]))
    assert torch.equal(got, torch.stack([decode(files[i], 6, False, "") for i in (2, 0)]))
    assert expand(pattern) == expand(str(tmp_path / "t-*.tar"))
    one = WebDataset(shards=str(tmp_path / "t-01.tar"), size=6, classes=5).open()
    assert one.batch(Draws(1, torch.arange(2)))[1].tolist() == [4, 4]
    assert "t-02.tar is missing" in refused(lambda: expand(str(tmp_path / "t-{00..02}.tar")))
    assert "match no file" in refused(lambda: expand(str(tmp_path / "u-*.tar")))
    assert "t-01.tar:x/c: its class is 4, not one of 0..3" in refused(
        WebDataset(shards=str(tmp_path / "t-01.tar"), size=6, classes=4).open
    )
    whole = (tmp_path / "t-00.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + len(files[0]) // 2])
    assert "cut.tar" in refused(WebDataset(shards=str(tmp_path / "cut.tar"), size=6).open)
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 99)
    assert "no.tar: not a readable tar file" in refused(WebDataset(shards=str(tmp_path / "no.tar"), size=6).open)
    make_tar(tmp_path / "bare.tar", {"a.txt": b"one"})
    assert "bare.tar:a: has no picture" in refused(WebDataset(shards=str(tmp_path / "bare.tar"), size=6).open)


def make_sentence(folder: Path) -> Path:
    """A tiny text model with a word tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({w for p in PROMPTS for w in p.split()})]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_the_pooled_embedding_is_the_mean_of_the_words_alone(tmp_path: Path):
    told = SentenceEncoder(path=str(make_sentence(tmp_path / "s")), length=6).open()(PROMPTS)
    counts = [len(p.split()) for p in PROMPTS]
    assert told["mask"].sum(1).tolist() == counts == [3, 3, 1, 5]
    for i, count in enumerate(counts):
        torch.testing.assert_close(told["pooled"][i], told["text"][i, :count].mean(0))


def test_prompts_alone_train_without_pictures(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    encoder = SentenceEncoder(path=str(make_sentence(tmp_path / "s")), length=5)
    spec = Prompts(
        path=str(tmp_path / "prompts.txt"),
        shape=(4, 8, 6),
        encoder=encoder,
        text_cache=str(tmp_path / "cache"),
    )
    data = spec.open()
    assert data.shape == (4, 8, 6)
    cond = data.conditions(Draws(3, torch.arange(6)))
    which = Draws(3, torch.arange(6)).integers(4)
    live = encoder.open()([PROMPTS[i] for i in which.tolist()])
    assert cond["text"].shape == (6, 5, 8)
    for key, value in live.items():
        torch.testing.assert_close(cond[key], value, rtol=0, atol=1e-5)
    assert data.null(cond)["mask"].shape == (6, 5)
    assert "holds prompts and no pictures" in refused(lambda: data.batch(Draws(3, torch.arange(2))))
    shutil.rmtree(tmp_path / "s")
    assert refused(spec.open) == f"encoder {tmp_path / 's'}: no such folder"
    (tmp_path / "prompts.txt").write_text("\n\n")
    assert "holds no prompt; write one a line" in refused(spec.open)


def make_pipeline(folder: Path) -> Path:
    """Stable Diffusion's parts, tiny: enough for its own encode_prompt."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({w for p in PROMPTS for w in p.split()})]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=9)
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            max_position_embeddings=9,
            eos_token_id=0,
            bos_token_id=1,
            pad_token_id=0,
            **sizes,
        )
    )
    StableDiffusionPipeline(
        vae=None,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_a_pipelines_own_encoder_gives_the_rows(tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    folder = make_pipeline(tmp_path / "sd")
    text = embed(PipelineEncoder(path=str(folder)), PROMPTS, cache=str(tmp_path / "cache"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=None, vae=None, safety_checker=None)
    with torch.no_grad():
        want, empty = pipe.encode_prompt(list(PROMPTS), torch.device("cpu"), 1, True, negative_prompt=[""] * 4)
    got = text.take(torch.arange(4))
    assert list(got) == ["text"]
    torch.testing.assert_close(got["text"], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.null(got)["text"], empty, rtol=0, atol=1e-5)
    shutil.rmtree(folder / "text_encoder")
    told = refused(lambda: embed(PipelineEncoder(path=str(folder)), PROMPTS, cache=str(tmp_path / "cache")))
    assert told.startswith(f"encoder {folder}: text_encoder is missing")
    with pytest.raises(UserError, match=r"length: StableDiffusionPipeline has a fixed number of tokens"):
        embed(
            PipelineEncoder(path=str(make_pipeline(tmp_path / "b")), length=5),
            PROMPTS,
            cache=str(tmp_path / "c"),
        )
