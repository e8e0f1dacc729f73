package config

import (
	"os"
	"path/filepath"
)

// audit checks where the audit log is to be, if there is one, and makes its path absolute. Whether
// it can be written shows when it is opened.
func (v *validator) audit(a *Audit) {
	if a == nil {
		return
	}
	if a.Path != "" {
		if !filepath.IsAbs(a.Path) {
			a.Path = filepath.Join(v.dir, a.Path)
		}
		info, err := os.Stat(filepath.Dir(a.Path))
		switch {
		case err != nil:
			v.report("audit.path", "make the folder, for the user the proxy runs as", "its folder cannot be used: %s", fileError(err))
		case !info.IsDir():
			v.report("audit.path", "correct the path", "%s is not a folder", filepath.Dir(a.Path))
		default:
			if info, err := os.Lstat(a.Path); err == nil && !info.Mode().IsRegular() {
				v.report("audit.path", "name a file in a folder of its own", "%s is there, and is no regular file", a.Path)
			}
		}
	}
	v.between("audit.maxSizeMiB", a.MaxSizeMiB, 1, 1<<20, "the default is 100")
	v.between("audit.maxFiles", a.MaxFiles, 2, 10_000, "the default is 10")
}
