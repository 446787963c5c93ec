"""The mathematics of training a diffusion model: noise schedules, timesteps, losses."""
