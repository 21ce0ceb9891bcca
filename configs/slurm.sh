#!/bin/bash
# Two machines with 8 GPUs each: sbatch configs/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120

# Two minutes before the time is up SLURM sends SIGUSR1; Lightning then saves a checkpoint and requeues the job, which
# continues from it. The folder is the job's own: Lightning resumes from any such checkpoint that it finds there.
logs="logs/slurm_$SLURM_JOB_ID"

# Since SLURM 22.05 srun does not take --cpus-per-task from sbatch, and each rank may use its own CPUs only.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" gmarpp fit \
  --config configs/vit_large_tiny_imagenet.yaml \
  --config configs/trainer/nodes2.yaml \
  --data.num_workers "$SLURM_CPUS_PER_TASK" \
  --trainer.default_root_dir "$logs" \
  --trainer.logger.save_dir "$logs"
