"""The teacher's side: photographs and captions in, one map per word out."""
