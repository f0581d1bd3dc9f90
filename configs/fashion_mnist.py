"""Mosaic on 6,000 images of Fashion-MNIST, ten clients, a ResNet-18 layout of width 8.

    python -m mosaic_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

On one CPU core 21 to 30 minutes. Test accuracy over seeds 0, 1, 2: global model 73.6 ± 4.4, teacher
79.6 ± 3.9, student 77.4 ± 2.6, fine-tuned 78.3 ± 1.6; `:severe` 43.4 ± 10.9, 67.1 ± 1.2,
72.8 ± 1.9, 73.9 ± 1.3.
"""

from mosaic_jax.configs import common

SETTINGS = {
    "data.name": "fashion_mnist",
    "data.train_images": 6000,
    "data.test_images": 2000,
    "model.width": 8,
    "local_update.rounds": 30,
    "local_update.learning_rate": 0.1,
    "local_update.final_learning_rate": 0.005,
    "fedgen.weight": 1.0,
    "prototypes.per_class": 20,
    "meta_model.steps": 300,
    "meta_model.feedforward": 256,
    "generator_optimization.steps": 1000,
    "generator_optimization.frozen_every": 4,
    "generator_optimization.block_steps": 50,
    "generator_optimization.batch_size": 32,
    "generator_optimization.width": 16,
    "generator_optimization.adversary_width": 16,
    "knowledge_distillation.steps": 120,
    "knowledge_distillation.block_steps": 20,
    "knowledge_distillation.images_per_generator": 13,
    "knowledge_distillation.class_prior": True,
    "knowledge_distillation.learning_rate": 2e-4,
    "fine_tuning.rounds": 3,
    "fine_tuning.learning_rate": 5e-4,
    "fine_tuning.batch_norm": "frozen",
}
NARROW = {  # the student starts from a model that knows little
    "knowledge_distillation.steps": 400,
    "knowledge_distillation.learning_rate": 1e-3,
}

get_config = common.with_options(SETTINGS, narrow=NARROW)
