// Command cluster holds every program of a Kubernetes cluster that is Go, in one binary: linked apart they would take seven times the
// disk and the linking. The program is named by the binary's own name (a link called kubectl is kubectl) or by the first argument.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	etcd "go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
	"plimsoll.dev/tests/cluster/bootstrap"
)

// components are Kubernetes' own programs; building a command registers flags, so that only the one asked for is built.
var components = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	"kube-proxy":              proxy.NewProxyCommand,
}

// programs are this project's own.
var programs = map[string]func(arguments []string) error{
	"pki":                bootstrap.WritePKI,
	"device-plugin":      bootstrap.ServeDevices,
	"volume-provisioner": bootstrap.ProvisionVolumes,
	"image":              bootstrap.WriteImage,
	"health":             bootstrap.CheckHealth,
}

func main() {
	name := filepath.Base(os.Args[0])
	if name == "cluster" {
		if len(os.Args) < 2 {
			fmt.Fprintln(os.Stderr, "usage: cluster PROGRAM [ARGUMENT...]")
			os.Exit(2)
		}
		name = os.Args[1]
		os.Args = append([]string{name}, os.Args[2:]...)
	}
	switch {
	case name == "etcd":
		etcd.Main(os.Args)
	case name == "kubectl":
		runKubectl()
	case components[name] != nil:
		os.Exit(cli.Run(components[name]()))
	case programs[name] != nil:
		if err := programs[name](os.Args[1:]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			os.Exit(1)
		}
	default:
		fmt.Fprintf(os.Stderr, "cluster: there is no program %q\n", name)
		os.Exit(2)
	}
}

// runKubectl does what kubectl's own main does: the verbosity is read first, since the command's construction already logs.
func runKubectl() {
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args))
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}
