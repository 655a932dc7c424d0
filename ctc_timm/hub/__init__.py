"""Publishing runs on the Hugging Face Hub, and cataloging what is published."""
