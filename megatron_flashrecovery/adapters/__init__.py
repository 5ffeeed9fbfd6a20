"""One module or package for each training framework; the only code that may import one."""
