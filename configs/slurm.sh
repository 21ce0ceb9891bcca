#!/bin/bash
# Two machines with 8 GPUs each: sbatch configs/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120

# Two minutes before the time is up SLURM sends SIGUSR1; Lightning then saves a checkpoint and requeues the job, which
# continues from it.
srun python train.py fit \
  --config configs/vit_large_tiny_imagenet.yaml \
  --config configs/trainer/nodes2.yaml
