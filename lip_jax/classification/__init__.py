"""The first task: images to classes. Augmentation, evaluation, prediction, fine-tuning."""
