package compose

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// localImage is the image that make image builds.
const localImage = "etcd-kms-proxy:local"

func needEngine(t *testing.T) {
	t.Helper()
	if os.Getenv("COMPOSE_TEST") == "" {
		t.Skip("needs a Docker engine and the images: make compose-test runs it")
	}
}

func mustDocker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := docker(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestImage checks that the image is small, unprivileged and labeled, has one layer with no trace
// of the time of its build, and that its binary is the one that the same flags build here.
func TestImage(t *testing.T) {
	needEngine(t)
	var images []struct {
		Size   int64
		Config struct {
			User            string
			Entrypoint, Cmd []string
			Labels          map[string]string
			Healthcheck     struct{ Test []string }
			StopSignal      string
			Env             []string
			ExposedPorts    map[string]any
		}
		RootFS struct{ Layers []string }
	}
	if err := json.Unmarshal([]byte(mustDocker(t, "image", "inspect", localImage)), &images); err != nil {
		t.Fatal(err)
	}
	image := images[0]
	if image.Size >= 30e6 {
		t.Errorf("the image has %d bytes", image.Size)
	}
	c := image.Config
	if c.User != "65532:65532" || !slices.Equal(c.Healthcheck.Test, []string{"CMD", "/usr/local/bin/etcd-kms-proxy", "healthcheck"}) ||
		!slices.Equal(c.Entrypoint, []string{"/usr/local/bin/etcd-kms-proxy"}) || !slices.Equal(c.Cmd, []string{"serve"}) || c.StopSignal != "SIGTERM" || len(image.RootFS.Layers) != 1 {
		t.Errorf("the image is %+v", image)
	}
	revision, version := c.Labels["org.opencontainers.image.revision"], c.Labels["org.opencontainers.image.version"]
	for _, name := range []string{"title", "description", "source", "licenses", "version", "revision"} {
		if c.Labels["org.opencontainers.image."+name] == "" {
			t.Errorf("no label %s", name)
		}
	}
	if got := mustDocker(t, "run", "--rm", "--read-only", "--network=none", localImage, "version"); !strings.Contains(got, version) {
		t.Errorf("version prints %q, and the label is %q", got, version)
	}

	id := mustDocker(t, "create", localImage)
	t.Cleanup(func() { _, _ = docker(context.WithoutCancel(t.Context()), "rm", id) })
	dir := t.TempDir()
	archive := filepath.Join(dir, "image.tar")
	mustDocker(t, "save", "-o", archive, localImage)
	layer := layerOf(t, archive)
	epoch := int64(-1)
	if out, err := exec.Command("git", "log", "-1", "--format=%ct", revision).Output(); err == nil {
		epoch, _ = strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if epoch >= 0 && h.ModTime.Unix() != epoch {
			t.Errorf("%s is of %v, and the commit is of %v", h.Name, h.ModTime, time.Unix(epoch, 0))
		}
		if h.Mode&0o022 != 0 && h.Name != "tmp/" || h.Mode&0o6000 != 0 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		if own := h.Uid == 65532; own != (strings.HasPrefix(h.Name, "setup/") || strings.Contains(h.Name, "/etcd-kms-proxy/")) {
			t.Errorf("%s belongs to %d", h.Name, h.Uid)
		}
	}
	t.Logf("%d bytes: %s", image.Size, strings.Join(names, " "))

	// The sources must be those of the image.
	same := exec.Command("git", "diff", "--quiet", revision, "--", "go.mod", "go.sum", "cmd", "config", "crypto", "internal", "kmsclient", "lifecycle", "proxy")
	same.Dir = filepath.Join("..", "..")
	if err := same.Run(); err != nil || strings.HasSuffix(version, "-dirty") {
		t.Logf("the sources have changed since %s: the binary is not compared", version)
		return
	}
	mustDocker(t, "cp", id+":/usr/local/bin/etcd-kms-proxy", filepath.Join(dir, "from-image"))
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version="+version, "-o", filepath.Join(dir, "built"), "./cmd/etcd-kms-proxy")
	build.Dir, build.Env = filepath.Join("..", ".."), append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if a, b := digestOf(t, filepath.Join(dir, "from-image")), digestOf(t, filepath.Join(dir, "built")); a != b {
		t.Errorf("the image's binary is %s, and what the same flags build here %s", a, b)
	}
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// layerOf returns the only layer of a saved image.
func layerOf(t *testing.T, archive string) []byte {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var largest []byte
	for r := tar.NewReader(f); ; {
		_, err := r.Next()
		if errors.Is(err, io.EOF) {
			return largest
		} else if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > len(largest) {
			largest = data
		}
	}
}

// TestRunImage runs the image as docs/deploy/docker.md describes: it becomes healthy, drains and
// exits with 0. Its log reports mistakes in its files.
func TestRunImage(t *testing.T) {
	needEngine(t)
	if os.Getuid() != 0 {
		t.Skip("the files are given to user 65532, which only root may do")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "config")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(folder, "key.yaml")
	if out, err := exec.Command(harness.Bin(t, "etcd-kms-proxy"), "kms", "new-local-key", key).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	config := `apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners: [{address: 127.0.0.1:2379}]
etcd: {endpoints: [http://127.0.0.1:1]}
kms: [{name: dev, local: {keyFile: key.yaml}}]
rules: [{prefix: "", writeWith: dev}]
admin: {}
`
	if err := os.WriteFile(filepath.Join(folder, "config.yaml"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(t *testing.T, args ...string) string {
		t.Helper()
		name := fmt.Sprintf("ekptest-image-%d-%d", os.Getpid(), time.Now().UnixNano())
		id := mustDocker(t, append(append([]string{"run", "-d", "--name", name, "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--stop-timeout", "20",
			"-v", folder + ":/etc/etcd-kms-proxy:ro"}, args...), localImage)...)
		t.Cleanup(func() { _, _ = docker(context.WithoutCancel(t.Context()), "rm", "-f", id) })
		return id
	}
	says := func(t *testing.T, id string, texts ...string) {
		t.Helper()
		harness.Eventually(t, within, "its end", func() error {
			if state, err := docker(t.Context(), "inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", id); err != nil || state != "exited 3" {
				return fmt.Errorf("%s, %w", state, err)
			}
			return nil
		})
		logs := mustDocker(t, "logs", id)
		for _, text := range texts {
			if !strings.Contains(logs, text) {
				t.Errorf("no %q in\n%s", text, logs)
			}
		}
	}
	t.Run("files of another user", func(t *testing.T) { // owned by root: a correct mode, and a wrong owner
		says(t, run(t), "key.yaml: permission denied", "hint: ")
	})
	if err := os.Chown(key, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	t.Run("it serves", func(t *testing.T) {
		id := run(t)
		harness.Eventually(t, within, "it to be healthy", func() error {
			state, err := docker(t.Context(), "inspect", "-f", "{{.State.Health.Status}} {{range .State.Health.Log}}{{.Output}}{{end}}", id)
			if err == nil && !strings.HasPrefix(state, "healthy") {
				err = errors.New(state)
			}
			if err == nil && !strings.Contains(state, "[-]etcd: no endpoint is connected") {
				t.Errorf("the health log is %q", state)
			}
			return err
		})
		mustDocker(t, "stop", id)
		if code := mustDocker(t, "inspect", "-f", "{{.State.ExitCode}}", id); code != "0" {
			t.Errorf("it exits with %s", code)
		}
	})
	t.Run("as root", func(t *testing.T) {
		says(t, run(t, "--user", "0"), "key.yaml: permission denied", "hint: ")
	})
	t.Run("no configuration", func(t *testing.T) {
		out, err := docker(t.Context(), "run", "--rm", localImage)
		if err == nil || !strings.Contains(out, "config.yaml: no such file or directory") || !strings.Contains(out, "hint: ") {
			t.Errorf("%v\n%s", err, out)
		}
	})
	if err := os.Chmod(key, 0o666); err != nil {
		t.Fatal(err)
	}
	t.Run("a key that others may write", func(t *testing.T) {
		says(t, run(t), "users other than its owner can use it (mode 0666)", "chmod 600")
	})
}
