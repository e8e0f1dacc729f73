package kubeadm

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// imageNames returns the images that kubeadm starts, by the last part of their name.
func imageNames(t *testing.T) map[string]string {
	t.Helper()
	out, err := exec.Command(harness.Bin(t, "kubeadm"), "config", "images", "list", "--kubernetes-version", kubernetesVersion).Output()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	for name := range strings.Lines(string(out)) {
		name = strings.TrimSpace(name)
		short, _, _ := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
		all[short] = name
	}
	return all
}

func pauseImage(t *testing.T) string { return imageNames(t)["pause"] }

// makeImages writes an archive with images of the programs that a control plane needs, each with
// one static binary, under the names that kubeadm uses, and with one of the proxy. Nothing is
// pulled.
func makeImages(t *testing.T, env *harness.Env) string {
	t.Helper()
	pause := filepath.Join(env.Dir, "pause")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", pause, "./pause")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pause: %v\n%s", err, out)
	}
	names := imageNames(t)
	path := filepath.Join(env.Dir, "images.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	a := &archive{w: tar.NewWriter(f)}
	for program, file := range map[string]string{
		"kube-apiserver": harness.Bin(t, "kube-apiserver"), "kube-controller-manager": harness.Bin(t, "kube-controller-manager"),
		"kube-scheduler": harness.Bin(t, "kube-scheduler"), "etcd": harness.Bin(t, "etcd-3.7"), "pause": pause,
	} {
		if err = errors.Join(err, a.add(names[program], program, file, []string{program})); names[program] == "" {
			t.Fatalf("kubeadm has no image of %s: %v", program, names)
		}
	}
	err = errors.Join(err, a.add(proxyImage, "etcd-kms-proxy", harness.Bin(t, "etcd-kms-proxy"), nil), a.close(), f.Close())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// archive writes the format of `docker save`.
type archive struct {
	w        *tar.Writer
	manifest []archived
}

// archived is an entry of manifest.json.
type archived struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// add adds an image that has nothing but a program.
func (a *archive) add(name, program, file string, command []string) error {
	digest := sha256.New()
	size, err := layer(digest, program, file)
	if err != nil {
		return err
	}
	id := hex.EncodeToString(digest.Sum(nil))
	if err := a.header(id+".tar", size); err != nil {
		return err
	}
	if _, err := layer(a.w, program, file); err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Env": []string{"PATH=/usr/local/bin"}, "Entrypoint": command},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + id}},
	})
	if err != nil {
		return err
	}
	a.manifest = append(a.manifest, archived{program + ".json", []string{name}, []string{id + ".tar"}})
	return a.file(program+".json", config)
}

func (a *archive) header(name string, size int64) error {
	return a.w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Format: tar.FormatPAX})
}

func (a *archive) file(name string, data []byte) error {
	err := a.header(name, int64(len(data)))
	if err == nil {
		_, err = a.w.Write(data)
	}
	return err
}

func (a *archive) close() error {
	data, err := json.Marshal(a.manifest)
	return errors.Join(err, a.file("manifest.json", data), a.w.Close())
}

// layer writes a layer with one program in /usr/local/bin, and returns its size.
func layer(to io.Writer, program, file string) (int64, error) {
	in, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return 0, err
	}
	counted := &counting{to: to}
	w := tar.NewWriter(counted)
	for _, dir := range []string{"usr/", "usr/local/", "usr/local/bin/", "tmp/"} {
		mode := int64(0o755)
		if dir == "tmp/" {
			mode = 0o1777
		}
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: mode}))
	}
	if err == nil {
		err = w.WriteHeader(&tar.Header{Name: "usr/local/bin/" + program, Mode: 0o755, Size: info.Size(), Format: tar.FormatPAX})
	}
	if err == nil {
		_, err = io.Copy(w, in)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return 0, fmt.Errorf("layer of %s: %w", program, err)
	}
	return counted.n, nil
}

// counting counts the bytes that it passes on.
type counting struct {
	to io.Writer
	n  int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.to.Write(p)
	c.n += int64(n)
	return n, err
}
