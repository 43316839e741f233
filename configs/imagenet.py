"""The networks of the paper on ImageNet, with its recipe: one command per row of tables 1 to 4.

Command:   python train.py --config=configs/imagenet.py:lip_resnet50 --workdir=runs/lip_resnet50
           The argument is a model (`lip-jax models` lists them) or a row of the table below. With
           ",tiny" behind it, as in configs/imagenet.py:table1_average,tiny, everything is shrunk to
           a few steps on small images of the embedded data set, to see that a row runs at all.
Data:      imagenet2012 as TFDS or `lip-jax data prepare` make it (docs/data.md);
           --config.data.data_dir=DIR if it is not in ~/tensorflow_datasets. To try a machine
           without it: --config.data.dataset=fake
Hardware:  not yet run here; docs/tpu.md has the batch for each TPU and what it would take
Expected:  the paper's top-1 and top-5 in percent, one crop of 224 px; "N/A": did not train in the
           paper either; "-": a further pooling, not the paper's. `lip-jax tables` adds ours.

  argument                  top-1  top-5  our result
  table1_strided            76.40  93.15  not yet run
  table1_average            76.96  93.35  not yet run
  table1_dpp                76.87  93.30  not yet run
  table1_dpp_original       77.22  93.64  not yet run
  table1_lip_projection     77.49  93.86  not yet run
  table1_lip_bottleneck64   77.92  93.97  not yet run
  table1_lip_bottleneck128  78.19  93.96  not yet run
  table1_lip_bottleneck256  78.15  94.02  not yet run
  table2_a                  78.19  93.96  not yet run
  table2_b                    N/A    N/A  not yet run
  table2_c                  77.81  93.86  not yet run
  table2_d                  77.89  93.86  not yet run
  table3_a                  78.19  93.96  not yet run
  table3_b                  77.87  93.94  not yet run
  table3_c                  77.78  93.81  not yet run
  table3_d                  76.92  93.37  not yet run
  table3_e                  76.40  93.15  not yet run
  table4_resnet50           76.40  93.15  not yet run
  table4_lip_resnet50       78.19  93.96  not yet run
  table4_resnet101          77.98  93.98  not yet run
  table4_lip_resnet101      79.33  94.60  not yet run
  table4_resnet152          78.49  94.22  not yet run
  table4_densenet121        75.62  92.56  not yet run
  table4_lip_densenet121    76.64  93.16  not yet run
  further_max                   -      -  not yet run
  further_dpp_lite_asym         -      -  not yet run
  further_dpp_full_sym          -      -  not yet run
  further_dpp_full_asym         -      -  not yet run
  further_soft                  -      -  not yet run
  further_lp                    -      -  not yet run
  further_exp                   -      -  not yet run

Recipe (section 4.1): that of Goyal et al. 2017 for 256 images, with the vanilla momentum instead of
Nesterov's, and a weight decay of 1e-4 on all parameters, those of batch norms included. Batch norm
over 32 images (64 for DenseNets), as on the paper's 8 (4) GPUs. As in the authors' training script,
the learning rate is 0.1, divided by 10 after 30, 60 and 80 of 90 epochs, without warm-up or label
smoothing. Any value can be set, such as --config.dtype=bfloat16 or
--config.model.lip_stages="('c4', 'c5')".
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lip_jax import list_models, paper
from lip_jax.errors import UsageError


def get_config(arg: str = "lip_resnet50") -> ConfigDict:
  """Configuration of a model or row.

  Args:
    arg: one of `lip_jax.list_models()` or a name of `lip_jax.paper.NETWORKS`; and ",tiny".

  Raises:
    UsageError: anything else, with what there is.
  """
  name, _, size = arg.partition(",")
  if size not in ("", "tiny"):
    raise UsageError(f"unknown size {size!r} in {arg!r}; leave it out, or write {name},tiny")
  model, options = _network(name)

  config = ConfigDict()
  config.seed = 0
  config.num_epochs = 90.0
  config.global_batch_size = 256
  config.eval_batch_size = 256
  config.dtype = "float32"  # or bfloat16
  config.gradient_dtype = "float32"  # in which they are added up over devices; or bfloat16
  config.fsdp = 1  # devices that share parameters and optimizer state
  config.accumulation_steps = 1  # parts of a device's images, one after the other
  config.remat = False  # less memory, a forward pass more
  config.label_smoothing = 0.0

  config.model = ConfigDict()
  config.model.name = model
  config.model.pool = "lip" if model.startswith("lip_") else "original"
  config.model.logit = "bottleneck"  # or projection
  config.model.logit_width = 16 if model == "lip_resnet_small" else 128
  config.model.logit_top = "norm_gate"  # or norm, gate, none
  config.model.average_steps = 0
  config.model.pool_parameter = placeholder(float)  # of pool exp or lp
  config.model.structure = "baseline"  # or dense
  config.model.lip_stages = ("stem", "c3", "c4", "c5")
  config.model.update(options)
  if "densenet" in model:
    config.model.bn_group_size = 64  # 0: the whole batch
  else:
    config.model.bn_group_size = 32
    config.model.zero_init_residual = True

  config.data = ConfigDict()
  config.data.dataset = paper.DATASET
  config.data.data_dir = placeholder(str)  # ~/tensorflow_datasets
  config.data.train_split = "train"
  config.data.validation_split = "validation"
  config.data.image_size = 224
  config.data.crop_scale = (0.08, 1.0)
  config.data.eval_resize = 256
  config.data.flip = True
  config.data.mean = (123.675, 116.28, 103.53)
  config.data.std = (58.395, 57.12, 57.375)
  config.data.num_threads = 16
  config.data.eval_crops = 1
  config.data.shuffle_window = 4096  # encoded images, of data sets in TFRecord format

  # Beside crops and flips, all off: the recipe has none of them.
  config.data.augment = ConfigDict()
  config.data.augment.mixup = 0.0
  config.data.augment.cutmix = 0.0
  config.data.augment.cutmix_probability = 0.5  # where both are on
  config.data.augment.erasing = 0.0
  config.data.augment.brightness = 0.0
  config.data.augment.contrast = 0.0
  config.data.augment.saturation = 0.0
  config.data.augment.randaugment_ops = 0
  config.data.augment.randaugment_magnitude = 9.0

  config.optim = ConfigDict()
  config.optim.base_lr = 0.1  # per 256 images
  config.optim.schedule = "step"
  config.optim.step_epochs = (30, 60, 80)
  config.optim.step_factor = 0.1
  config.optim.warmup_epochs = 0.0
  config.optim.warmup_lr = 0.0
  config.optim.momentum = 0.9
  config.optim.weight_decay = 1e-4

  config.log_every_steps = 100
  config.eval_every_epochs = 1.0
  config.checkpoint_every_steps = 1000
  config.keep_checkpoints = 2
  config.watchdog_seconds = 300.0  # a step that takes longer is reported, and where it hangs
  config.importance_images = 8
  config.importance_every_epochs = 0.0  # how often they are drawn for TensorBoard; 0: never
  if size:
    _shrink(config)
  return config


def _network(name: str) -> tuple[str, dict[str, Any]]:
  """Name of the model and its options."""
  if name in list_models():
    return name, {}
  if name in paper.NETWORKS:
    row = paper.NETWORKS[name]
    return str(row.model), dict(row.options)
  raise UsageError(
    f"unknown network {name!r}; choose one of the models {', '.join(list_models())} or of the "
    f"paper's rows {', '.join(paper.NETWORKS)}; with ,tiny behind it for a trial"
  )


def _shrink(config: ConfigDict) -> None:
  """What is left is the kind of network: four steps of it in seconds."""
  config.num_epochs = 0.5
  config.global_batch_size = 8
  config.eval_batch_size = 8

  config.model.width = 8
  config.model.logit_width = 4
  config.model.average_steps = min(config.model.average_steps, 1)
  config.model.bn_group_size = 4
  if "densenet" in config.model.name:
    config.model.block_sizes = (1, 1, 1, 1)
    config.model.growth = 4
  else:
    config.model.stage_sizes = (1, 1, 1, 1)

  config.data.dataset = "cluttered_digits/classify"
  config.data.train_split = "train[:64]"
  config.data.validation_split = "validation[:16]"
  config.data.image_size = 32
  config.data.eval_resize = 36
  config.data.num_threads = 2

  config.log_every_steps = 1
  config.eval_every_epochs = 0.5
  config.checkpoint_every_steps = 4
