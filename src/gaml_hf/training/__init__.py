"""Training: gradient alignment (Zhu et al., 2021, Sec. 5) and the trainer around it."""
