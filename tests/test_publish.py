"""What is put on the Hub is the LoRA as it is here, a card that says what it is, and nothing of the user's machine."""

import hashlib
import json
import re

import hubserver
import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from said import names, naming

from lorakit import config as configs
from lorakit import named, publish
from lorakit.config import Config
from lorakit.console import Console
from lorakit.dataset import selection

TOKEN = "hf_" + "k" * 34
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WIDTHS = {"sd15": 768, "sd2": 1024, "sdxl": 2048}
PROMPTS = ("sks thing, a house", 'sks thing: "a | boat"')
METADATA = {
    "ss_sd_model_name": SD15, "ss_network_module": "networks.lora", "ss_learning_rate": "0.0001", "ss_steps": "2000",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01)", "ss_min_snr_gamma": "5.0", "ss_seed": "42",
    "ss_noise_offset": "None", "ss_clip_skip": "2", "modelspec.trigger_phrase": "sks thing",
    "ss_dataset_dirs": json.dumps({"2_sks thing": {"n_repeats": 2, "img_count": 6}}),
}  # fmt: skip


def a_lora(path, family="sd15", metadata=METADATA, parts=("lora_down.weight", "lora_up.weight")):
    torch = pytest.importorskip("torch")
    down, up = torch.ones(4, WIDTHS[family]), torch.ones(16, 4)
    return saved(
        {f"{MODULE}.{parts[0]}": down, f"{MODULE}.{parts[1]}": up, f"{MODULE}.alpha": torch.tensor(2.0)}, path, metadata
    )


def saved(tensors, path, metadata=None):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    return path


def save_samples(run_folder, step, pictures, prompts):
    from lorakit import sample

    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        text = sample.infotext(prompt, 42 + number, picture.size[::-1], sample.Sampling())
        path = run_folder / "samples" / f"step-{step:06d}" / f"{number:02d}-seed-{42 + number}.png"
        sample.write_picture(picture, path, text)


def table(card):
    """Setting → value, as a card shows them."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, re.MULTILINE)[2:])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hubserver.running(TOKEN) as server:
        server.used_by(monkeypatch, tmp_path / "hub-cache")
        yield server


@pytest.fixture
def run_folder(pictures, tmp_path, monkeypatch):
    """A finished run of a user zaphod's, with paths of this machine wherever a run has them."""
    monkeypatch.setenv("HOME", str(home := tmp_path / "zaphod"))
    folder = tmp_path / "run"
    folder.mkdir()
    config = Config(
        base=str(home / "base.safetensors"), dataset=str(pictures), name="thing", trigger="sks thing", steps=20,
        sample_prompts=PROMPTS, start_from=str(home / "older.safetensors"), validation_pictures=("3.png",),
    )  # fmt: skip
    (folder / "config.json").write_text(config.to_json())
    (folder / "log.jsonl").write_text(json.dumps({"step": 20, "loss": 0.1, "path": str(folder)}))
    a_lora(folder / "thing.safetensors")
    for step in (10, 20):
        save_samples(folder, step, [Image.new("RGB", (8, 8), (step, 0, n)) for n in range(2)], PROMPTS)
    Image.new("RGB", (32, 8)).save(folder / "comparison.png")
    return folder


def test_a_run_is_put_there_whole_in_one_commit(hub, run_folder):
    said = []
    assert publish.upload(run_folder, "owner/thing", console=Console(said.append)) == f"{hub.url}/owner/thing"
    assert HfApi().list_repo_files("owner/thing") == [
        ".gitattributes", "thing.safetensors", "README.md", "lorakit.json", "comparison.png",
        "samples/00-seed-42.png", "samples/01-seed-43.png",
    ]  # fmt: skip
    assert hub.commits == [("owner/thing", "Upload thing with lorakit")] and hub.private["owner/thing"]
    stored = hub.files["owner/thing"]
    for path in ("thing.safetensors", "comparison.png"):
        assert stored[path] == (run_folder / path).read_bytes()
    newest = run_folder / "samples" / "step-000020" / "00-seed-42.png"
    assert stored["samples/00-seed-42.png"] == newest.read_bytes()
    assert hashlib.sha256(stored["thing.safetensors"]).hexdigest()[:16] in said[-1]


def test_the_card_says_what_the_file_is(hub, run_folder):
    publish.upload(run_folder, "owner/thing", comment="Made of old photographs.")
    stored = hub.files["owner/thing"]
    card = ModelCard(stored["README.md"].decode())
    told = card.data.to_dict()
    assert told["base_model"] == SD15 and told["license"] == "creativeml-openrail-m"
    assert (told["library_name"], told["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert told["instance_prompt"] == "sks thing"
    tags = {"text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora", "lorakit"}
    assert set(told["tags"]) == tags
    assert [entry["text"] for entry in told["widget"]] == list(PROMPTS)
    shown = [entry["output"]["url"] for entry in told["widget"]] + re.findall(r"!\[.*\]\((.*)\)", card.text)
    assert len(shown) == 3 and stored.keys() >= set(shown)
    rows = table(card)
    assert (rows["algorithm"], rows["rank"], rows["alpha"]) == ("LoRA", "4", "2")
    title = {key: name for name, key in publish.SETTINGS.items()}
    for key, value in {"ss_learning_rate": "0.0001", "ss_steps": "2000", "ss_seed": "42"}.items():
        assert rows[title[key]] == value
    assert title["ss_noise_offset"] not in rows and "Made of old photographs." in card.text
    assert list(rows.values())[-2:] == ["6", "2"] and "`sks thing`" in card.text  # pictures, repeats
    assert 'load_lora_weights("owner/thing", weight_name="thing.safetensors")' in card.text
    assert "clip_skip=1" in card.text  # kohya's 2


def test_the_example_is_a_program(tmp_path):
    code = re.search("```python\n(.*)```", publish.card(a_lora(tmp_path / "a.safetensors"), "owner/a"), re.DOTALL)[1]
    compile(code, "card", "exec")


def test_nothing_of_the_machine_or_the_pictures_is_sent(hub, run_folder, tmp_path, pictures):
    publish.upload(run_folder, "owner/thing")
    of_dataset = {path.read_bytes() for path in pictures.rglob("*.*")}
    for path, content in hub.files["owner/thing"].items():
        assert content not in of_dataset, path
        assert not [secret for secret in (str(tmp_path), "zaphod", TOKEN) if secret.encode() in content], path
    settings = json.loads(hub.files["owner/thing"]["lorakit.json"])
    assert settings["base"] == SD15 and settings["steps"] == 20 and "3.png" not in str(settings)
    assert not settings.keys() & {"dataset", "start_from"}


def test_the_settings_can_be_trained_with_again(hub, run_folder, tmp_path):
    publish.upload(run_folder, "owner/thing")
    (tmp_path / "again.json").write_bytes(hub.files["owner/thing"]["lorakit.json"])
    assert configs.load(tmp_path / "again.json").sample_prompts == PROMPTS


def test_pictures_go_along_when_asked_for(hub, run_folder, pictures):
    publish.upload(run_folder, "owner/thing", pictures=True)
    stored = hub.files["owner/thing"]
    for path in pictures.rglob("*.*"):
        assert stored[f"dataset/2_sks thing/{path.name}"] == path.read_bytes()


def test_replaced_pictures_go_along_under_their_names_and_over_no_other(hub, run_folder, pictures, tmp_path):
    own, captions = pictures / "2_sks thing", {}
    for name, kind in (("0.jpg", "JPEG"), ("1 (2).png", "PNG"), ("1.jpg", "JPEG")):
        Image.new("RGB", (8, 8), (len(captions), 9, 9)).save(own / name, kind)
        captions[name] = f"a picture, {name}"
    (own / "1 (2).txt").write_text(captions["1 (2).png"])
    replacements = {}
    for number, kind in (("1", "jpg"), ("2", "webp"), ("3", "png"), ("0", "jpg")):
        replacements[number] = file = tmp_path / f"secret {number}.{kind}"
        Image.new("RGB", (8, 8), (int(number), 99, 0)).save(file)
    named = {f"2_sks thing/{number}.png": str(file) for number, file in replacements.items()}
    selection.save_decisions(
        selection.Decisions(replace=named),
        tmp_path / "decisions.json",
        configs.load(run_folder / "config.json").dataset,
    )
    config = configs.load(run_folder / "config.json").with_(decisions=str(tmp_path / "decisions.json"))
    (run_folder / "config.json").write_text(config.to_json())
    publish.upload(run_folder, "owner/thing", pictures=True)
    stored = {path.rpartition("/")[2]: content for path, content in hub.files["owner/thing"].items() if "sks" in path}
    for name, file in {"1 (3).jpg": "1", "2.webp": "2", "3.png": "3", "0 (2).jpg": "0"}.items():
        assert stored[name] == replacements[file].read_bytes()
        assert stored[name.rpartition(".")[0] + ".txt"] == f"sks thing, number {file}".encode()
    for name in ("0.jpg", "1.jpg", "1 (2).png", "4.png", "5.png"):
        assert stored[name] == (own / name).read_bytes()
    assert stored["1 (2).txt"] == captions["1 (2).png"].encode() and not any("secret" in name for name in stored)
    assert not stored.keys() & {"0.png", "1.png", "2.png"}


def test_pictures_are_not_made_public_by_accident(hub, run_folder):
    hub.create("owner/thing", private=False)
    with pytest.raises(ValueError, match=naming("owner/thing", "private")):
        publish.upload(run_folder, "owner/thing", pictures=True)
    assert hub.commits == []
    publish.upload(run_folder, "owner/thing", pictures=True, private=False)
    assert "dataset/2_sks thing/0.png" in hub.files["owner/thing"]


def test_captions_with_a_path_are_not_sent(hub, run_folder, pictures):
    (pictures / "2_sks thing" / "3.txt").write_text("sks thing, /home/somebody/3.png")
    with pytest.raises(ValueError, match=naming("3.png")):
        publish.upload(run_folder, "owner/thing", pictures=True)
    assert hub.files == {}


def test_samples_with_a_path_are_not_sent(hub, run_folder):
    """A run without sample_prompts samples its captions, and these may hold anything."""
    (run_folder / "config.json").write_text(Config(steps=20, name="thing").to_json())
    prompts, said = ["sks thing", "sks thing, /home/somebody/3.png"], []
    save_samples(run_folder, 30, [Image.new("RGB", (8, 8))] * 2, prompts)
    publish.upload(run_folder, "owner/thing", console=Console(said.append))
    shown = [path for path in hub.files["owner/thing"] if path.endswith(".png")]
    assert shown == ["samples/00-seed-42.png"] and b"comparison.png" not in hub.files["owner/thing"]["README.md"]
    assert names(said[0], "samples", "01-seed-43.png") and names(said[1], "samples", "sample_prompts")


def test_metadata_with_a_path_is_not_sent(hub, tmp_path):
    lora = a_lora(tmp_path / "a.safetensors", metadata=METADATA | {"ss_training_comment": "from /home/somebody/x"})
    with pytest.raises(ValueError, match=naming("ss_training_comment")):
        publish.upload(lora, "owner/a")
    assert hub.files == {}


# ── Files alone ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_alone(hub, tmp_path):
    lora = a_lora(tmp_path / "alone v1.safetensors")
    publish.upload(lora, "owner/alone", private=False, licence="cc-by-4.0")
    stored = hub.files["owner/alone"]
    assert stored.keys() == {".gitattributes", "alone v1.safetensors", "README.md"} and not hub.private["owner/alone"]
    card = ModelCard(stored["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and "widget" not in card.data and "<Gallery />" not in card.text
    assert HfApi().hf_hub_download("owner/alone", lora.name).endswith("alone v1.safetensors")


@pytest.mark.parametrize("family, tag", [("sd2", "stable-diffusion"), ("sdxl", "stable-diffusion-xl")])
def test_families(tmp_path, family, tag):
    """kohya's file of a checkpoint that is no model of the Hub."""
    metadata = {"ss_sd_model_name": "some|mix.safetensors", "ss_dataset_dirs": "{}"}
    card = ModelCard(publish.card(a_lora(tmp_path / "a.safetensors", family, metadata), "owner/a"))
    assert card.data.license == "openrail++" and tag in card.data.tags
    assert card.data.base_model is None and "some\\|mix.safetensors" in card.text
    assert named.OF_FAMILY[family].reference in card.text and table(card).keys() == {"algorithm", "rank", "alpha"}


def test_no_metadata_at_all(tmp_path):
    card = ModelCard(publish.card(a_lora(tmp_path / "a.safetensors", metadata=None), "owner/a"))
    assert names(card.text, "LoRA", "SD 1.5") and table(card)["rank"] == "4" and "instance_prompt" not in card.data


def test_diffusers_is_not_promised_what_it_cannot_read(tmp_path):
    torch = pytest.importorskip("torch")
    side = {"a": torch.ones(16, 4), "b": torch.ones(4, 768)}
    tensors = {f"{MODULE}.hada_w{n}_{key}": side[key].clone() for n in (1, 2) for key in side}
    card = publish.card(saved(tensors, tmp_path / "a.safetensors"), "owner/a")
    assert names(card, "LoHa", "SD 1.5") and "load_lora_weights" not in card


@pytest.mark.parametrize("layout, example", [("unet.{}", True), ("base_model.model.{}", False)])
def test_other_layouts_are_promised_to_nobody_else(tmp_path, layout, example):
    torch = pytest.importorskip("torch")
    module = layout.format("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 768), f"{module}.lora_B.weight": torch.ones(16, 4)}
    card = publish.card(saved(tensors, tmp_path / "a.safetensors"), "owner/a")
    assert "A1111" not in card and ("load_lora_weights" in card) is example


# ── What stands in the way ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_card_of_somebody_elses_stays(hub, run_folder):
    hub.create("owner/thing", private=True)
    hub.files["owner/thing"]["README.md"] = theirs = b"---\nlicense: mit\n---\n# Mine, by hand\n"
    said = []
    publish.upload(run_folder, "owner/thing", console=Console(said.append))
    assert hub.files["owner/thing"]["README.md"] == theirs and "thing.safetensors" in hub.files["owner/thing"]
    assert names(said[0], "card", "README.md", "owner/thing")
    publish.upload(run_folder, "owner/thing", overwrite=True)
    assert b"template:sd-lora" in hub.files["owner/thing"]["README.md"]


def test_a_card_of_ours_is_renewed(hub, run_folder):
    hub.create("owner/thing", private=False)
    for comment in ("First.", "Second."):
        publish.upload(run_folder, "owner/thing", comment=comment)
    assert b"Second." in hub.files["owner/thing"]["README.md"] and len(hub.commits) == 2
    assert not hub.private["owner/thing"]  # as it was


def test_a_file_that_arrives_damaged_is_noticed(hub, run_folder):
    hub.corrupt = "thing.safetensors"
    digest = hashlib.sha256((run_folder / "thing.safetensors").read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=naming("thing.safetensors", "owner/thing", digest)) as caught:
        publish.upload(run_folder, "owner/thing")
    assert len(set(re.findall("[0-9a-f]{64}", str(caught.value)))) == 2  # of what is here, and of what is there


def test_an_unfinished_run(hub, run_folder):
    (run_folder / "thing.safetensors").unlink()
    with pytest.raises(ValueError, match=naming("run", "thing.safetensors")):
        publish.upload(run_folder, "owner/thing")


def test_a_checkpoint(tmp_path):
    settings = {"lorakit": json.dumps({"step": 5, "settings": {}})}
    with pytest.raises(ValueError, match=naming("a.safetensors")):
        publish.upload(a_lora(tmp_path / "a.safetensors", metadata=settings), "owner/a")


@pytest.mark.parametrize("name", ["thing", "a/b/c", "owner/my thing", "https://huggingface.co/owner/thing"])
def test_names_that_are_no_repository(tmp_path, name):
    with pytest.raises(ValueError, match=naming(repr(name), "owner/name")):
        publish.upload(tmp_path / "a.safetensors", name)


def test_no_token(hub, run_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=naming("hf auth login", "HF_TOKEN")):
        publish.upload(run_folder, "owner/thing")


def refused(hub, run_folder, capfd, error):
    """What is said of a failed upload; the token is nowhere in it."""
    with pytest.raises(error) as caught:
        publish.upload(run_folder, "owner/thing")
    captured = capfd.readouterr()
    assert not re.search(r"hf_\w", str(caught.value) + captured.out + captured.err)
    assert not any("safetensors" in path for files in hub.files.values() for path in files)
    return str(caught.value)


def test_a_wrong_token(hub, run_folder, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    assert names(refused(hub, run_folder, capfd, PermissionError), 401, "hf auth login", "HF_TOKEN")


def test_a_token_that_cannot_be_sent(hub, run_folder, capfd, monkeypatch, tmp_path):
    """httpx quotes the header in its error; requests sends it all the same."""
    (tmp_path / "token").write_text(TOKEN + "\0")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "")
    told = refused(hub, run_folder, capfd, OSError)
    assert names(told, hub.url) or names(told, 401)


@pytest.mark.parametrize("there", [False, True])
def test_no_right_to_write(hub, run_folder, capfd, there):
    if there:
        hub.create("owner/thing", private=False)
    hub.refuse = True
    told = refused(hub, run_folder, capfd, PermissionError)
    assert names(told, 403, "owner/thing")


def test_a_name_that_is_taken(hub, run_folder, capfd, monkeypatch):
    hub.create("owner/thing", private=True)
    monkeypatch.setattr(hub, "hidden", True)
    assert names(refused(hub, run_folder, capfd, FileExistsError), 409, "owner/thing")


def test_the_hub_is_down(hub, run_folder, capfd):
    hub.down = True
    assert names(refused(hub, run_folder, capfd, OSError), 503)


def test_no_way_to_the_hub(hub, run_folder, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert names(refused(hub, run_folder, capfd, ConnectionError), "http://127.0.0.1:9")


# ── The stand-in itself ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_stand_in_speaks_the_clients_language(hub, tmp_path):
    api = HfApi()
    assert api.whoami()["name"] == "owner"
    assert api.create_repo("owner/a", exist_ok=True) == api.create_repo("owner/a", exist_ok=True)
    (tmp_path / "f" / "deep").mkdir(parents=True)
    for path, content in {"f/a.txt": b"text", "f/deep/b.safetensors": b"large" * 9}.items():
        (tmp_path / path).write_bytes(content)
    api.upload_folder(repo_id="owner/a", folder_path=tmp_path / "f")
    assert sorted(api.list_repo_files("owner/a")) == [".gitattributes", "a.txt", "deep/b.safetensors"]
    assert [entry.path for entry in api.list_repo_tree("owner/a", "deep")] == ["deep/b.safetensors"]
    for name in ("a.txt", "deep/b.safetensors"):
        with open(api.hf_hub_download("owner/a", name), "rb") as stream:
            assert stream.read() == hub.files["owner/a"][name]
    api.delete_file("a.txt", "owner/a")
    assert not api.file_exists("owner/a", "a.txt") and api.file_exists("owner/a", "deep/b.safetensors")
    assert not api.repo_exists("owner/b") and hub.files.keys() == {"owner/a"}
