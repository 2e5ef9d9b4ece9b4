import json
import subprocess
import sys

import pytest
from PIL import Image
from said import line, names, naming

from lorakit import config, kohya
from lorakit.dataset import folder as folders
from lorakit.kohya import tables

TOML = """
[model]
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
v2 = false

[dataset]
train_data_dir = "pictures"
resolution = "512,512"
caption_extension = ".txt"
shuffle_caption = true
random_crop = true

[training]
output_name = "my_cat_v1"
output_dir = "/somewhere"
network_module = "networks.lora"
network_dim = 64
network_alpha = 32
unet_lr = 2e-4
text_encoder_lr = 5e-5
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.99"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 100
max_train_epochs = 10
train_batch_size = 2
min_snr_gamma = 5
noise_offset = 0.05
mixed_precision = "fp16"
cache_latents = true
seed = 1234
keep_tokens = 0
"""


def test_the_toml_of_sd_scripts(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    imported = kohya.read(file)
    taken = imported.config.model_dump(exclude_unset=True)
    assert taken == {
        "base": "runwayml/stable-diffusion-v1-5", "dataset": "pictures", "name": "my_cat_v1", "batch_size": 2,
        "rank": 64, "alpha": 32, "warmup_steps": 100, "schedule_cycles": 3, "min_snr_gamma": 5, "noise_offset": 0.05,
        "seed": 1234, "epochs": 10, "learning_rate": 2e-4, "learning_rate_ratio": 1.0, "resolution": 512,
        "bucket_step": 64, "optimizer": "adamw8bit", "schedule": "cosine_with_restarts", "weight_decay": 0.05,
        "mixed_precision": "fp16", "shuffle_captions": True, "keep_tokens": 0, "text_encoder_rate": 5e-5,
        "train_unet": True,
    }  # fmt: skip
    notes = imported.notes
    assert line(notes, "random_crop", "True") and line(notes, "betas", "0.9,0.99")
    assert line(notes, "cache_latents") and line(notes, "output_dir")
    assert not line(notes, "keep_tokens") and not line(notes, "v2")  # switched off: nothing is lost


def test_what_is_not_said_is_sd_scripts_own_default():
    imported = kohya.convert({"train_data_dir": "pictures", "network_train_unet_only": True})
    settings = imported.config
    assert (settings.rank, settings.alpha, settings.steps, settings.learning_rate) == (4, 1, 1600, 2e-6)
    assert settings.min_snr_gamma is None and settings.optimizer == "adamw" and not imported.notes


def test_a_command_line():
    imported = kohya.from_command(
        'accelerate launch --num_cpu_threads_per_process=2 "C:/x y/sdxl_train_network.py" \\\n'
        "  --train_data_dir 'my pictures' --network_dim=16 --network_alpha 8 --gradient_checkpointing \\\n"
        "  --network_args conv_dim=8 conv_alpha=4 --optimizer_type Prodigy --learning_rate 1.0 "
        "--max_train_steps=2000 --xformers --resolution 1024,768 --network_train_unet_only --ip_noise_gamma 0.1"
    )
    settings = imported.config
    assert (settings.dataset, settings.rank, settings.alpha, settings.steps) == ("my pictures", 16, 8, 2000)
    assert settings.gradient_checkpointing and settings.optimizer == "prodigy" and settings.learning_rate == 1.0
    assert (settings.targets, settings.conv_rank, settings.conv_alpha) == ("attention+conv", 8, 4)
    assert (settings.resolution, settings.input_perturbation) == (896, 0.1)
    assert line(imported.notes, "resolution", "1024,768", "896×896") and line(imported.notes, "xformers")


def test_the_guis_preset(tmp_path):
    file = tmp_path / "preset.json"
    file.write_text(json.dumps({
        "LoRA_type": "Kohya LoCon", "max_resolution": "768,768", "epoch": 8, "optimizer": "Adafactor",
        "optimizer_args": "weight_decay=0.02", "lr_warmup": 10, "lr_scheduler": "cosine", "learning_rate": 0.0003,
        "text_encoder_lr": 0, "unet_lr": 0.0003, "network_dim": 32, "network_alpha": 16, "conv_dim": 8, "conv_alpha": 4,
        "min_snr_gamma": 0, "seed": "", "multires_noise_discount": 0, "xformers": "xformers", "caption_extension": "",
        "train_data_dir": "pictures", "output_name": "last", "sample_prompts": "a cat --n bad",
    }))  # fmt: skip
    imported = kohya.read(file)
    settings = imported.config
    assert (settings.resolution, settings.epochs, settings.optimizer) == (768, 8, "adafactor")
    assert (settings.warmup_steps, settings.weight_decay, settings.min_snr_gamma) == (0.1, 0.02, None)
    assert (settings.learning_rate, settings.sample_prompts) == (1e-4, ("a cat",))  # its rate has relative steps
    assert (settings.targets, settings.conv_rank) == ("attention+conv", 8)
    assert [note.split(":")[0] for note in imported.notes] == ["relative_step", "xformers"]


@pytest.mark.parametrize(
    ("settings", "algorithm", "factor"),
    [
        ({"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=8"]}, "lokr", 8),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=-1"]}, "lokr", None),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}, "loha", None),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=locon", "conv_dim=4"]}, "lora", None),
        ({"network_module": "lycoris.kohya", "network_args": ["dora_wd=True", "wd_on_output=False"]}, "dora", None),
        ({"LoRA_type": "LyCORIS/LoHa"}, "loha", None),
        ({"network_module": "networks.lokr"}, "lokr", None),
        ({"LoRA_type": "Standard", "text_encoder_lr": 0, "unet_lr": 0}, "lora", None),
        ({"LoRA_type": "Standard", "conv_dim": 1, "dora_wd": True, "factor": 8}, "lora", None),
    ],
)
def test_algorithms(settings, algorithm, factor, tmp_path):
    file = tmp_path / "preset.json"
    file.write_text(json.dumps(settings))
    imported = kohya.read(file)
    assert (imported.config.algorithm, imported.config.lokr_factor) == (algorithm, factor)
    assert not imported.notes
    assert imported.config.targets == ("attention+conv" if "ycoris" in str(settings).lower() else "attention")


def test_lycoris_presets_say_whether_convolutions_are_adapted():
    for preset, targets in {"full": "attention+conv", "attn-mlp": "attention", "attn-only": "attention"}.items():
        command = f"train_network.py --network_module=lycoris.kohya --network_args algo=loha preset={preset}"
        assert kohya.from_command(command).config.targets == targets


def test_whole_matrices_are_asked_for_by_a_rank_no_layer_has():
    command = (
        "train_network.py --network_module lycoris.kohya --network_dim=100000 --network_args algo=lokr conv_dim=1e5"
    )
    imported = kohya.from_command(command)
    assert (imported.config.rank, imported.config.conv_rank) == (1024, 1024)
    assert line(imported.notes, "network_dim", 100000, 1024)


def test_names_and_paths_are_no_numbers_and_no_escapes():
    command = (
        r'train_network.py --output_name=2024_05 --train_data_dir "C:\imgs\my cat" --reg_data_dir C:\r --network_dim 8'
    )
    made = kohya.from_command(command).config
    assert (made.name, made.dataset, made.regularisation, made.rank) == ("2024_05", r"C:\imgs\my cat", r"C:\r", 8)


DIMS = ",".join(str(n) for n in range(25))
BLOCKS = f"train_network.py --network_args block_dims={DIMS} down_lr_weight={','.join(['0.5'] * 12)} mid_lr_weight=2"


def test_ranks_and_rates_by_block():
    made = kohya.from_command(BLOCKS).config
    assert made.block_ranks["down_blocks.0.attentions.0"] == 1 and made.block_ranks["down_blocks.2.attentions.1"] == 8
    assert made.block_ranks["mid_block"] == 12
    assert made.block_ranks["up_blocks.1.attentions.0"] == 16 and made.block_ranks["up_blocks.3.attentions.2"] == 24
    assert made.block_rates == {f"down_blocks.{i}.attentions.{j}": 0.5 for i in range(3) for j in range(2)} | {
        "mid_block": 2.0
    }
    for key, value in (("block_dims", "1,2,3"), ("down_lr_weight", "sine")):
        (note,) = kohya.from_command(f"train_network.py --network_train_unet_only --network_args {key}={value}").notes
        assert names(note, key, value, 25)


def test_convolutions_keep_their_rank_in_each_block():
    pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    from lorakit.adapter import injection
    from lorakit.adapter.specs import run_specs
    from lorakit.base.model import known

    wide = kohya.from_command(BLOCKS + " conv_dim=4").config
    assert wide.block_ranks["up_blocks.0.resnets.2"] == 15 and wide.block_ranks["down_blocks.2.downsamplers"] == 4
    unet = UNet2DConditionModel.from_config(known("sd15").configs["unet"] | {"block_out_channels": [32] * 4})
    adapter = injection.inject(unet, run_specs(unet, wide), wide.seed)  # every place is one
    assert adapter.ranks["up_blocks.0.upsamplers.0.conv"] == adapter.ranks["mid_block.resnets.1.conv2"] == 4
    assert adapter.ranks["up_blocks.0.resnets.2.conv1"] == 4
    assert adapter.ranks["up_blocks.0.resnets.2.time_emb_proj"] == 15


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer_type": "DAdaptation"}, ("optimizer_type", "DAdaptation", "prodigy")),
        ({"optimizer_type": "CAME"}, ("optimizer_type", "CAME", "adamw", "prodigy")),
        ({"optimizer_type": "Lion8bit"}, ("optimizer_type", "Lion8bit", "lion")),
        ({"optimizer_type": "AdamW", "learning_rate": 1.0}, ("learning_rate", 1.0, "adamw", "1e-4")),
        ({"lr_scheduler": "piecewise_constant"}, ("lr_scheduler", "piecewise_constant", "constant")),
        ({"lr_warmup_steps": 50}, ("lr_warmup_steps", "lr_scheduler", "constant")),
        ({"network_module": "networks.oft"}, ("network_module", "networks.oft", "LoRA", "LoCon", "DoRA")),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=ia3"]}, ("algo", "ia3", "LoRA")),
        ({"gui_lora_type": "LyCORIS/Diag-OFT"}, ("gui_lora_type", "LyCORIS/Diag-OFT", "LoRA")),
        ({"network_args": ["algo=loha", "dora_wd=True"]}, ("dora_wd", "DoRA", "loha")),
        ({"network_module": "lycoris.kohya", "network_args": ["dora_wd=True"]}, ("dora_wd", "LyCORIS")),
        ({"network_dim": 8, "optimizer_state": "old.pt"}, ("optimizer_state", "old.pt")),
        ({"network_dim": -3}, ("network_dim", -3, 4)),
        ({"network_dim": 4096}, ("network_dim", 4096, 1024)),
        ({"bucket_reso_steps": 1}, ("bucket_reso_steps", 1, 8)),
        ({"clip_skip": 7}, ("clip_skip", 7, 4)),
        ({"seed": 2**32 + 5}, ("seed", 2**32 + 5, 5)),
        ({"enable_bucket": True, "resolution": 1024, "max_bucket_reso": 768}, ("max_bucket_reso", 768, 1024)),
        ({"debiased_estimation_loss": True, "min_snr_gamma": 5}, ("debiased_estimation_loss", "min_snr_gamma")),
        ({"optimizer_type": "Prodigy", "learning_rate": 1e-4}, ("learning_rate", 0.0001, 1)),
        ({"optimizer_type": "Prodigy", "unet_lr": 1, "text_encoder_lr": 0.5}, ("text_encoder_lr", 0.5, 1)),
        ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"}, ("lr_scheduler", "cosine", "constant")),
        ({"noise_offset": "a lot", "network_dim": 8}, ("noise_offset", "a lot")),
        ({"max_token_length": 100}, ("max_token_length", 100, 225)),
        ({"masked_loss": True}, ("masked_loss", "mask")),
        ({"output_name": "my/lora"}, ("output_name", "my/lora", "my_lora")),
        ({"enable_bucket": False, "bucket_no_upscale": True}, ("enable_bucket", "False")),
    ],
)
def test_nothing_is_dropped_in_silence(settings, named):
    imported = kohya.convert(settings)
    assert line(imported.notes, *named), imported.notes


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("x.toml", "a = = 1", ("x.toml",)),
        ("x.toml", "[[datasets]]\nresolution = 512", ("x.toml", "dataset")),
        ("x.json", "[1]", ("x.json", "list")),
        ("x.json", "{", ("x.json",)),
        ("x.txt", "train_network.py", ()),
        ("x.json", "{}", ("sd-scripts", "GUI")),
        ("x.json", '{"hello": 1}', ("sd-scripts", "GUI")),
        ("x.json", '{"training_method": "LORA", "base_model_name": "x"}', ("OneTrainer",)),
        ("x.json", '{"base": "demo", "rank": 8, "steps": 10}', ("x.json", "train")),
        ("x.json", '{"LoRA_type": "Flux1", "network_dim": 16}', ("Flux",)),
        ("x.json", '{"sd3_checkbox": true, "network_dim": 16}', ("Stable Diffusion 3",)),
        ("x.sh", "python flux_train_network.py --network_dim 4", ("Flux",)),
        ("x.sh", "train_network.py --network_dim 4\ntrain_network.py --network_dim 8", (2,)),
        ("x.toml", 'optimizer_type = "Sophia"\nlearning_rate = 1.0', ("optimizer_type", "Sophia", "Prodigy")),
        (
            "x.toml",
            "network_train_text_encoder_only = true\nnetwork_train_unet_only = true",
            ("network_train_text_encoder_only", "network_train_unet_only"),
        ),
    ],
)
def test_what_cannot_be_read_is_explained(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=naming(*named)):
        kohya.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=naming("missing.toml")):
        kohya.read(tmp_path / "missing.toml")


def test_the_command_prints_a_config_and_tells_the_rest(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    done = subprocess.run([sys.executable, "-m", "lorakit", "kohya", str(file)], capture_output=True, text=True)
    (tmp_path / "run.json").write_text(done.stdout)
    assert config.load(tmp_path / "run.json").rank == 64
    assert line(done.stderr.splitlines(), "random_crop", "True")


@pytest.mark.parametrize(
    "options, rule, sides",
    [
        ("--resolution=512", "kohya", (None, None)),
        ("--enable_bucket --resolution=512", "kohya", (256, 1024)),  # sd-scripts' own
        ("--enable_bucket --resolution=1024,1024 --min_bucket_reso=512", "kohya", (512, 1024)),
        ("--enable_bucket --min_bucket_reso=320 --max_bucket_reso=768", "kohya", (320, 768)),
        ("--bucket_no_upscale --max_bucket_reso=768", "no_upscale", (None, 768)),
        ("--enable_bucket --bucket_no_upscale", "no_upscale", (None, None)),
        ("--enable_bucket=false --bucket_no_upscale", "kohya", (None, None)),
        ("--enable_bucket --resolution=2048", "kohya", (None, None)),
    ],
)
def test_rules_of_buckets(options, rule, sides):
    imported = kohya.from_command(f"train_network.py {options}")
    made = imported.config
    assert (made.bucket_rule, (made.min_bucket_side, made.max_bucket_side)) == (rule, sides)
    assert len(imported.notes) == ("=false" in options)


@pytest.mark.parametrize(
    "options, rates",
    [
        ("--learning_rate=1e-4", (1e-4, 1e-4, None, True)),  # sd-scripts trains text encoders by default
        ("--learning_rate=1e-4 --network_train_unet_only", (1e-4, 0, None, True)),
        ("--learning_rate=1e-4 --unet_lr=2e-4", (2e-4, 1e-4, None, True)),
        ("--learning_rate=1e-4 --text_encoder_lr 1e-5 5e-6", (1e-4, 1e-5, 5e-6, True)),
        ("--learning_rate=1e-4 --text_encoder_lr=0", (1e-4, 0, None, True)),
        ("--learning_rate=1e-4 --cache_text_encoder_outputs", (1e-4, 0, None, True)),
        ("--learning_rate=1e-4 --network_train_text_encoder_only", (1e-4, 1e-4, None, False)),
        ("--learning_rate=1e-4 --unet_lr=0 --text_encoder_lr=5e-5", (1e-4, 5e-5, None, False)),
    ],
)
def test_which_text_encoders_are_trained(options, rates):
    made = kohya.from_command(f"train_network.py {options}").config
    assert (made.learning_rate, made.text_encoder_rate, made.text_encoder_2_rate, made.train_unet) == rates


def test_escaped_spaces_hold_a_word_together():
    made = kohya.from_command(r"train.py --train_data_dir=my\ folder --network_dim 8").config
    assert made.dataset == "my folder"
    made = kohya.from_command("train.py --train_data_dir C:\\imgs\\ --network_dim 8").config
    assert (made.dataset, made.rank) == ("C:\\imgs\\", 8)
    with pytest.raises(ValueError, match="No closing quotation"):
        kohya.from_command("train.py --output_name=it's_me")


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"epoch": 12, "max_train_epochs": "", "max_train_steps": ""}, (12, None)),
        ({"epoch": 1, "max_train_steps": 900}, (None, 900)),
        ({"epoch": 1, "max_train_epochs": "3", "max_train_steps": 900}, (3, None)),
        ({"epoch": 0, "max_train_epochs": 0, "max_train_steps": 0, "network_dim": 8}, (None, 1600)),
    ],
)
def test_the_length_is_the_first_that_is_set(settings, length, tmp_path):
    """12 of 31 presets of the GUI used to become 1600 steps."""
    (tmp_path / "preset.json").write_text(json.dumps(settings))
    made = kohya.read(tmp_path / "preset.json").config
    assert (made.epochs, made.steps) == length


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_warmup": 10, "lr_warmup_steps": 0, "lr_scheduler": "cosine"}, {"warmup_steps": 0.1}),
        ({"lr_warmup": 10, "lr_warmup_steps": 50, "lr_scheduler": "cosine"}, {"warmup_steps": 50}),
        ({"noise_offset_type": "Original", "noise_offset": 0.1, "multires_noise_iterations": 6},
         {"noise_offset": 0.1, "multires_noise_iterations": 0}),
        ({"noise_offset_type": "Multires", "noise_offset": 0.1, "multires_noise_iterations": 6},
         {"noise_offset": 0, "multires_noise_iterations": 6}),
        ({"additional_parameters": "--network_train_unet_only --max_grad_norm=0"},
         {"text_encoder_rate": 0, "max_grad_norm": 0}),
        ({"network_dim": 16, "network_alpha": 0}, {"alpha": 16}),
        ({"masked_loss": True, "conditioning_data_dir": "masks"}, {"mask": "masks"}),
        ({"alpha_mask": True}, {"mask": "alpha"}),
        ({"validation_split": 0.1, "validate_every_n_steps": 20}, {"validation_share": 0.1, "validate_every": 20}),
        ({"optimizer": "DAdaptAdam", "learning_rate": 1}, {"optimizer": "prodigy", "learning_rate": 1}),
        ({"optimizer": "prodigyplus.ProdigyPlusScheduleFree"}, {"optimizer": "prodigy", "learning_rate": 1}),
        ({"optimizer": "Adafactor", "learning_rate": 1}, {"optimizer": "adafactor", "learning_rate": 1e-4}),
        ({"optimizer": "Adafactor", "learning_rate": 1e-3, "optimizer_args": "relative_step=False warmup_init=False"},
         {"learning_rate": 1e-3}),
    ],
)  # fmt: skip
def test_settings_of_the_gui(settings, expected, tmp_path):
    (tmp_path / "preset.json").write_text(json.dumps(settings))
    made = kohya.read(tmp_path / "preset.json").config
    assert {name: getattr(made, name) for name in expected} == expected


def test_variables_that_are_not_set_are_noted_and_change_no_setting():
    script = "dim=8\npython train_network.py --network_dim=$dim --shuffle_caption ${extArgs[@]}"
    imported = kohya.from_command(script)
    assert imported.config.shuffle_captions and imported.config.rank == 8
    assert line(imported.notes, "${extArgs[@]}")


def test_files_that_a_command_names_are_read(tmp_path):
    (tmp_path / "a.toml").write_text("network_dim = 8\nnetwork_alpha = 4\nseed = 7")
    (tmp_path / "b.toml").write_text(
        "[general]\nshuffle_caption = true\nkeep_tokens = 2\nkeep_tokens_separator = '|||'\nenable_wildcard = true\n"
        "secondary_separator = ';;;'\n[[datasets]]\nresolution = 768\nbatch_size = 4\n"
        "[[datasets.subsets]]\nimage_dir = 'cats'\nflip_aug = true\n"
    )
    (tmp_path / "run.txt").write_text("train_network.py --config_file=a --dataset_config=D:\\b.toml --network_dim=64")
    made = kohya.read(tmp_path / "run.txt").config
    assert (made.rank, made.alpha, made.seed, made.resolution, made.batch_size) == (64, 4, 7, 768, 4)
    assert (made.flip, made.shuffle_captions, made.keep_tokens) == (True, True, 2)
    assert (made.caption_lines, made.caption_choices) == ("random", True)
    assert (made.keep_tokens_separator, made.secondary_separator) == ("|||", ";;;")
    assert made.dataset == str(tmp_path / "b.toml")
    with pytest.raises(FileNotFoundError, match=naming("config_file", "c.toml")):
        kohya.from_command("train_network.py --config_file=c.toml", tmp_path)


@pytest.mark.parametrize(
    "script",
    [
        "# my run\n$dim = 16 # rank\naccelerate launch `\n  --num_cpu_threads_per_process=1 `\n"
        "  ./train_network.py `\n  --network_dim=$dim `\n  --output_name 'my cat'\nRead-Host",
        "@echo off\nREM a note\nset dim=16\ncall venv\\scripts\\activate\n"
        'python train_network.py ^\n --network_dim=%dim% ^\n --output_name="my cat"\npause',
        '#!/bin/bash\ndim="16"\nname="my cat"\npython "sd-scripts/train_network.py" \\\n  --network_dim=${dim} \\\n'
        "  --output_name=$name",
        "\ufefftrain_network.py --network_dim=16 --output_name=my\\ cat",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_scripts_of_every_shell(script, encoding, tmp_path):
    (tmp_path / "train.txt").write_bytes(script.encode(encoding))
    imported = kohya.read(tmp_path / "train.txt")
    assert (imported.config.rank, imported.config.name) == (16, "my cat") and not imported.notes


def test_the_files_of_lora_easy_training_scripts(tmp_path):
    (tmp_path / "easy.toml").write_text(
        "[[subsets]]\nnum_repeats = 2\nimage_dir = 'cats'\nshuffle_caption = true\n"
        "[[subsets]]\nnum_repeats = 3\nimage_dir = 'dogs'\ncaption_extension = '.txt'\n"
        "[general_args.args]\nmax_train_epochs = 4\nseed = 7\n"
        "[network_args.args]\nnetwork_dim = 16\nnetwork_alpha = 8\n[optimizer_args.args]\nlearning_rate = 2e-4\n"
    )
    made = kohya.read(tmp_path / "easy.toml").config
    assert (made.epochs, made.rank, made.alpha, made.learning_rate, made.shuffle_captions) == (4, 16, 8, 2e-4, True)
    assert made.dataset == str(tmp_path / "easy.toml")  # which names both folders
    for name, colour in (("cats", "red"), ("dogs", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "1.png")
    found = folders.scan(made.dataset, cache=tmp_path / "cache")
    assert [(picture.group, picture.repeats) for picture in found.pictures] == [("cats", 2), ("dogs", 3)]


@pytest.mark.parametrize(("name", "text"), [("run.toml", TOML), ("gui.json", '{"LoRA_type": "Standard"}')])
def test_training_with_a_file_of_kohyas_says_how_to_convert_it(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=naming(name, "lorakit kohya")):
        config.load(tmp_path / name)


def test_no_secret_is_shown():
    imported = kohya.convert({"network_dim": 8, "huggingface_token": "hf_x", "my_hf_token": "hf_y", "api_key": "z"})
    assert "api_key" in str(imported.notes) and not any(word in str(imported.notes) for word in ("hf_x", "hf_y", "=z"))


# ── Every setting with odd values ───────────────────────────────────────────────────────────────────────────────────

ODD = (None, "", 0, -1, 1, 3, 0.5, 1e9, 1e-9, 2**40, True, False, "0", "true", "None", "1e-4", "1,2", "nonsense",
       "…" * 99, "nan", float("inf"), [], [1, 2], ["a", {}], {}, {"a": 1})  # fmt: skip
NAMES = sorted({
    *tables.SAME, *tables.DEFAULTS, *tables.GUI, *tables.PLAIN, *tables.NOT_NEEDED, *tables.STANDARD_IGNORES, "epoch",
    "max_train_epochs", "unet_lr", "text_encoder_lr", "network_args", "optimizer_args", "loss_type", "masked_loss",
    "network_train_unet_only", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale",
    "enable_bucket", "conditioning_data_dir", "alpha_mask", "max_token_length", "block_dims", "down_lr_weight",
    "block_alphas", "dora_wd", "factor", "loraplus_lr_ratio", "lr_scheduler_type", "sample_prompts", "mixed_precision",
    "noise_offset_type", "additional_parameters", "v_parameterization", "use_8bit_adam", "scale_weight_norms",
})  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_values_are_read_or_refused_in_words(name, tmp_path):
    """No value of any setting ends in a traceback, and no setting of kohya's makes a config that is not valid."""
    file = tmp_path / "preset.json"
    for value in ODD:
        for rest in ({"network_dim": 8}, {"optimizer": "Prodigy", "LoRA_type": "LyCORIS/LoKr", "enable_bucket": True}):
            file.write_text(json.dumps(rest | {name: value}))
            try:
                made = kohya.read(file)
            except ValueError as error:
                assert "validation error" not in str(error) and str(error), (name, value)
                assert "kohya's settings:" not in str(error), (name, value, error)  # in words of lorakit's settings
            else:
                assert config.parse(json.loads(made.config.to_json())) == made.config
