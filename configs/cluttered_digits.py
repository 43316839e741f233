"""The embedded job: a small LIP-ResNet on cluttered_digits, 48 px, made on first use.

Command:   make train, or
           python train.py --config=configs/cluttered_digits.py --workdir=runs/cluttered_digits
Hardware:  2 CPU cores
Expected:  94.6 % top-1 (measured), in 3.5 minutes; three seeds of an earlier form: 91.2 to 94.5 %

The network that pools otherwise: --config.model.pool=strided (or average, max).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """Configuration of the embedded job."""
  config = ConfigDict()
  config.seed = 0
  config.num_epochs = 1.5
  config.global_batch_size = 32
  config.eval_batch_size = 200
  config.dtype = "float32"
  config.gradient_dtype = "float32"  # in which they are added up over devices; or bfloat16
  config.fsdp = 1  # devices that share parameters and optimizer state
  config.accumulation_steps = 1  # parts of a device's images, one after the other
  config.remat = False  # less memory, a forward pass more
  config.label_smoothing = 0.0

  config.model = ConfigDict()
  config.model.name = "lip_resnet_small"
  config.model.pool = "lip"  # or strided, average, max
  config.model.width = 16  # channels after the stem; doubles at each stage
  config.model.logit = "bottleneck"  # or projection
  config.model.logit_width = 16
  config.model.bn_group_size = 32  # 0: the whole batch

  config.data = ConfigDict()
  config.data.dataset = "cluttered_digits/classify"
  config.data.data_dir = placeholder(str)  # ~/tensorflow_datasets
  config.data.train_split = "train"
  config.data.validation_split = "validation"
  config.data.image_size = 48
  config.data.crop_scale = placeholder(tuple)  # no random crop
  config.data.eval_resize = placeholder(int)  # no resize
  config.data.flip = False  # a mirrored digit is another shape
  config.data.mean = (128.0, 128.0, 128.0)
  config.data.std = (64.0, 64.0, 64.0)
  config.data.num_threads = 2
  config.data.eval_crops = 1
  config.data.shuffle_window = 4096  # not used here: ArrayRecord is shuffled as a whole

  # Beside flips, all off.
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
  config.optim.base_lr = 0.8  # per 256 images: 0.1 at 32
  config.optim.schedule = "cosine"
  config.optim.step_epochs = ()
  config.optim.step_factor = 0.1
  config.optim.warmup_epochs = 0.1
  config.optim.warmup_lr = 0.0
  config.optim.momentum = 0.9
  config.optim.weight_decay = 1e-4

  config.log_every_steps = 20
  config.eval_every_epochs = 0.5
  config.checkpoint_every_steps = 100
  config.keep_checkpoints = 2
  config.watchdog_seconds = 300.0  # a step that takes longer is reported, and where it hangs
  config.importance_images = 8
  config.importance_every_epochs = 0.0  # how often they are drawn for TensorBoard; 0: never
  return config
