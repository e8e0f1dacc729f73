package kubeadm

import (
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestPodMountsWhatTheConfigurationNames(t *testing.T) {
	s := podSettings{
		image: "i", configFile: "/etc/etcd-kms-proxy/config.yaml", config: []byte("a"),
		facts: Facts{
			Admin:   "127.0.0.1:9379",
			Files:   []string{"/etc/kubernetes/pki/etcd/server.crt", "/etc/etcd-kms-proxy/key.yaml", "/etc/kubernetes/pki/etcd/server.crt", "/srv/id"},
			Folders: []string{"/run/kms"}, WritableFolders: []string{"/var/log/etcd-kms-proxy"},
		},
	}
	text, err := s.pod()
	if err != nil {
		t.Fatal(err)
	}
	var pod struct {
		Metadata struct{ Annotations map[string]string }
		Spec     struct {
			HostNetwork bool `yaml:"hostNetwork"`
			Containers  []struct {
				Command         []string
				SecurityContext struct {
					ReadOnlyRootFilesystem, AllowPrivilegeEscalation bool
				} `yaml:"securityContext"`
				VolumeMounts []struct {
					MountPath string `yaml:"mountPath"`
					ReadOnly  bool   `yaml:"readOnly"`
				} `yaml:"volumeMounts"`
			}
			Volumes []struct {
				HostPath struct{ Path, Type string } `yaml:"hostPath"`
			}
		}
	}
	if err := yaml.Unmarshal(text, &pod); err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, v := range pod.Spec.Volumes {
		m := pod.Spec.Containers[0].VolumeMounts[i]
		if m.MountPath != v.HostPath.Path {
			t.Errorf("%s is mounted at %s", v.HostPath.Path, m.MountPath)
		}
		mode := map[bool]string{true: "ro", false: "rw"}[m.ReadOnly]
		got = append(got, v.HostPath.Type+" "+m.MountPath+" "+mode)
	}
	want := []string{
		"Directory /etc/etcd-kms-proxy ro", "Directory /var/log/etcd-kms-proxy rw", "Directory /run/kms ro",
		"File /etc/kubernetes/pki/etcd/server.crt ro", "File /srv/id ro",
	}
	if !slices.Equal(got, want) {
		t.Errorf("mounts are %q, want %q", got, want)
	}
	if !pod.Spec.HostNetwork || strings.Contains(string(text), "privileged: true") {
		t.Errorf("the Pod is\n%s", text)
	}
	s.config = []byte("b")
	other, err := s.pod()
	if err != nil || slices.Equal(text, other) {
		t.Error("another configuration does not change the Pod, so kubelet would not restart it")
	}
}
