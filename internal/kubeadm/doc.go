// Package kubeadm puts the proxy between the API server and etcd of a kubeadm control-plane node, and
// takes it out again.
//
// kubeadm's control plane runs as static Pods: kubelet starts whatever manifest is in
// /etc/kubernetes/manifests. [Node.Enable] writes the proxy's configuration and its static Pod, waits
// until the proxy is ready, and then changes one flag in the API server's manifest. [Node.Disable]
// changes it back. Both wait until the API server is ready again, and restore the previous files if it
// is not.
//
// The package edits the API server's manifest as text: it changes bytes of one line, or adds or
// removes one line. It refuses a manifest that does not have the form that kubeadm writes. It does
// not use the Kubernetes API, etcd or a KMS. The caller passes a function that checks the
// configuration.
package kubeadm
