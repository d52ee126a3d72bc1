"""TODO edgetune/runtimes/layered/openvino."""
