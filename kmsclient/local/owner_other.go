//go:build !unix

package local

import "io/fs"

// keepOwner is for systems where files have a user and a group.
func keepOwner(string, fs.FileInfo) error { return nil }
