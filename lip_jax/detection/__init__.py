"""Object detection: what RetinaNet and Faster R-CNN are trained and evaluated with."""
