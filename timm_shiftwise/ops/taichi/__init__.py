"""The Taichi program of this process, and the vectors that its kernels are written in."""
