package cli

import (
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is what Main was given; `go install module@version` gives it through the build information instead.
var version string

// buildInfo says what this binary is.
type buildInfo struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a tree with uncommitted changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func readBuildInfo() buildInfo {
	b := buildInfo{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
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

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "print what this binary was built from",
		Args:  cobra.NoArgs,
	}
	out := outputFlag(cmd)
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		b := readBuildInfo()
		return out.write(cmd.OutOrStdout(), b, func(w io.Writer) {
			printf(w, "etcd-kms-proxy %s (%s, %s)\n", b.Version, b.Go, b.Platform)
		})
	})
	return cmd
}
