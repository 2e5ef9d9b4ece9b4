"""In Colab these talk to the page; here there is none, or it is Jupyter's."""


def clear(wait=False, output_tags=()):
    from IPython.display import clear_output

    clear_output(wait)


def eval_js(script, ignore_result=False, timeout_sec=None):
    return None


def enable_custom_widget_manager():
    pass


def disable_custom_widget_manager():
    pass


def register_callback(function_name, callback):
    pass
