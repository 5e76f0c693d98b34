"""Data-free knowledge transfer: a student trained on what a teacher makes of images that came from the teacher."""
