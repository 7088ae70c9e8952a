//! Disks that fail or fill up.
