"""Program files: static, like executables."""
