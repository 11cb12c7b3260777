"""Work on masks with the model in transformers, before anything is served: calibrate, verify."""
