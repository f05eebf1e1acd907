"""What sees: SSD, Faster R-CNN and YOLO, their backbones and losses; small classifiers; the VAE."""
