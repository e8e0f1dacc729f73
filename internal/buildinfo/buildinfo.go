// Package buildinfo tells what the running binary was built from.
package buildinfo

import (
	"runtime"
	"runtime/debug"
)

// Info describes a binary.
type Info struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a tree with uncommitted changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// release is the version that the linker was given, or "".
var release string

// SetRelease sets the version of a release build. It must be called before [Read], once.
func SetRelease(version string) { release = version }

// Read returns what the running binary was built from. Without [SetRelease], the version is that of
// the module (go install module@version) or "unknown".
func Read() Info {
	b := Info{Version: release, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		if b.Version == "" {
			b.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Commit = s.Value
			case "vcs.modified":
				b.Modified = s.Value == "true"
			}
		}
	}
	if b.Version == "" {
		b.Version = "unknown"
	}
	return b
}
