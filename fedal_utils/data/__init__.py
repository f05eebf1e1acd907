"""What is learned from: images, labels, readers and writers of the usual formats, partitions, augmentation."""
