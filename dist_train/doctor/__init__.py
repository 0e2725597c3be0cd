"""Looking after runs and machines: doctor, plan, acceptance, Slurm."""
