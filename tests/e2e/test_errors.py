"""What goes wrong is said in one line that names the thing and the remedy."""

import subprocess

import pytest
import tensorflow_datasets as tfds
from fixture_ports import free_port
from fixture_runs import write_images, write_run
from fixture_xla import QUICK

from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.distributed import service_log


def assert_one_line(done, *parts):
  assert done.returncode != 0, done.stdout
  message = done.stderr.strip()
  assert message.startswith("error: ")
  assert len(message.splitlines()) == 1, message
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize(
  ("override", "parts"),
  [
    ("--config.model.name=lip_resnet51", ["'lip_resnet51'", "choose one of", "lip_resnet50"]),
    ("--config.model.pool=lipp", ["'lipp'", "original, strided, average"]),
    (
      "--config.optim.learning_rate=1",
      ["config.optim", "'learning_rate'", "base_lr"],
    ),
    ("--config.sed=1", ["'sed'", "valid keys", "seed"]),
    ("--config.model.pol=max", ["config.model", "unknown option pol ", "pool"]),
    ("--config.data.dataset=imagenet2012", ["imagenet2012", "not prepared", "data.data_dir"]),
    ("--config.data.train_split=trian", ["'trian'", "train, validation"]),
    ("--config.model.bn_group_size=3", ["global_batch_size=8", "bn_group_size=3"]),
    ("--config.seed=abc", ["config.seed", "'abc'"]),
    ("--config.data.augment.mixup=-1", ["config.data.augment.mixup", "at least 0", "-1"]),
    ("--wrkdir=x", ["wrkdir", "workdir"]),
  ],
)
def test_bad_configurations(training, tmp_path, override, parts):
  assert_one_line(training.train(tmp_path / "run", override), *parts)


def test_batch_size_that_the_devices_cannot_share(training, tmp_path):
  done = training.train(
    tmp_path / "run",
    "--config.global_batch_size=12",
    "--config.model.bn_group_size=4",
    XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count=8",
  )
  assert_one_line(done, "global_batch_size=12", "8 devices", "8 or 16")


def test_flags_that_are_missing_or_unknown(training, tmp_path):
  flags = training.train_flags(tmp_path / "run")
  assert_one_line(training.run(flags[0]), "--workdir is missing")
  assert_one_line(training.run(flags[1]), "--config is missing", "configs/")
  assert_one_line(training.run("--config=configs/none.py", flags[1]), "configs/none.py")
  assert_one_line(training.run(*flags, "extra"), "'extra'")
  broken = tmp_path / "broken.py"
  broken.write_text("import nothing_of_that_name\n")
  assert_one_line(training.run(f"--config={broken}", flags[1]), str(broken), "nothing_of_that_name")


def test_workdir_of_another_run(training, tmp_path):
  workdir = tmp_path / "run"
  # A run that failed before its first checkpoint does not claim the place.
  assert training.train(workdir, "--config.model.pool=lipp").returncode == 1
  assert training.train(workdir, "--config.num_epochs=0.25").returncode == 0
  done = training.train(workdir, "--config.num_epochs=0.25", "--config.optim.base_lr=0.5")
  assert_one_line(done, str(workdir), "optim.base_lr: 0.5 (was 0.8)", "--workdir")
  # How often to log is no part of what a run computes.
  again = training.train(workdir, "--config.num_epochs=0.25", "--config.log_every_steps=7")
  assert again.returncode == 0, again.stderr


def test_a_start_of_several_processes_that_is_refused_changes_nothing(training, tmp_path, files_of):
  write_images(tmp_path / "images")
  write_run(tmp_path / "run", tmp_path / "images", {4: None})
  before = files_of(tmp_path / "run")
  company = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
  flags = training.train_flags(tmp_path / "run", *company)
  processes = [
    subprocess.Popen(
      training.command(*flags, f"--process_id={k}"),
      env=training.environment | service_log.ENVIRONMENT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for k in range(2)
  ]
  for process in processes:
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 1, message
    assert (
      "data.dataset: 'cluttered_digits/tiny' (was" in message or "ended with an error" in message
    )
  assert files_of(tmp_path / "run") == before


def test_a_network_without_lip_ends_without_a_picture(training, tmp_path):
  done = training.train(
    tmp_path / "run",
    "--config.num_epochs=0.25",
    "--config.model.pool=max",
    "--config.importance_images=3",
  )
  assert done.returncode == 0, done.stderr
  assert "top-1: " in done.stdout
  assert "importance" not in done.stdout


def test_workdir_that_cannot_be_written(training, tmp_path):
  (tmp_path / "file").touch()
  assert_one_line(
    training.train(tmp_path / "file" / "run"), str(tmp_path / "file"), "can be written"
  )


def test_evaluation_of_what_is_not_there(training, tmp_path):
  assert_one_line(training.lip_jax("evaluate", f"{tmp_path}/none"), f"{tmp_path}/none")
  training.train(tmp_path / "run", "--config.num_epochs=0.25")
  done = training.lip_jax("evaluate", str(tmp_path / "run"), "--checkpoint=77")
  assert_one_line(done, "'77'", "there are: 2")


def test_a_loss_that_is_not_finite_stops_the_run(training, tmp_path):
  workdir = tmp_path / "run"
  done = training.train(
    workdir,
    "--config.optim.base_lr=1e30",
    "--config.optim.warmup_epochs=1",
    "--config.optim.warmup_lr=0.001",
    "--config.checkpoint_every_steps=1",
  )
  assert done.returncode == 1
  assert_one_line(done, "step ", "loss", f"--start_from={workdir}/checkpoints/", "base_lr")
  # From there, with a learning rate that is not absurd, the run goes on.
  checkpoint = done.stderr.partition("--start_from=")[2].partition(",")[0]
  step = int(checkpoint.rpartition("/")[2])
  again = training.train(
    tmp_path / "again", f"--start_from={checkpoint}", "--config.num_epochs=0.5"
  )
  assert again.returncode == 0, again.stderr
  assert f"restored step {step} from {checkpoint}" in again.stdout
  start = f"--start_from={tmp_path}/again/checkpoints/4"
  done = training.train(tmp_path / "other", start, "--config.model.pool=max")
  assert_one_line(done, f"{tmp_path}/again/checkpoints/4", "of another model")
  done = training.train(tmp_path / "short", start, "--config.num_epochs=0.25")
  assert_one_line(done, "step 4", "ends at step 2", "num_epochs")


def damaged_digits():
  """The embedded data set with two unreadable training images and, on request, another one."""
  with tfds.core.registered.skip_registration():

    class Damaged(ClutteredDigits):
      name = "cluttered_digits"

      def _generate_examples(self, config, digits, split, count):
        for k, example in super()._generate_examples(config, digits, split, count):
          if split == "train" and k in (3, 40):
            example["image"] = example["image"][:200]
          if split == "validation" and k == 5 and self.builder_config.name.endswith("validation"):
            example["image"] = b""
          yield k, example

  return Damaged


def test_corrupt_images_are_skipped_and_counted_in_training(training, tmp_path):
  training.prepare("damaged", damaged_digits())
  workdir = tmp_path / "run"
  done = training.train(workdir, "--config.data.dataset=cluttered_digits/damaged")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "skipped unreadable" in done.stdout
  assert "train/000003" in done.stdout
  assert "train/000040" in done.stdout
  assert '"train/skipped_images": 2' in (workdir / "metrics.jsonl").read_text()
  # A restart remembers them from the first step on, and does not name them again.
  start = f"--start_from={workdir}/checkpoints/28"
  again = training.train(
    tmp_path / "again", start, "--config.data.dataset=cluttered_digits/damaged"
  )
  assert again.returncode == 0, again.stdout + again.stderr
  lines = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
  assert lines[0].startswith('{"step": 29,')
  assert '"train/skipped_images": 2' in lines[0]
  assert "skipped unreadable" not in again.stdout


def test_corrupt_images_are_an_error_in_evaluation(training, tmp_path):
  training.prepare("damaged_validation", damaged_digits())
  done = training.train(
    tmp_path / "run",
    "--config.data.dataset=cluttered_digits/damaged_validation",
    "--config.num_epochs=0.25",
  )
  assert_one_line(done, "validation/000005", "unreadable", str(training.data_dir))
